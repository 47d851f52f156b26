"""Private messages: noise that a client adds before it sends.

Nobody but the client is trusted. The mechanism's place in a `chain` is where
the noise is added. Everything after it, including the server's decoding, is
post-processing and costs no privacy:

  chain(gaussian_mechanism(...), codec)    noise before the encoder
  chain(codec, gaussian_mechanism(...))    noise after it, on the latent

`privacy.gaussian` accounts for the messages only. It does not cover metrics, or
a codec that was fitted to clients' vectors.
"""

import jax.numpy as jnp

from fedjax_llm.compression import base
from fedjax_llm.federated.privacy import mechanisms


def gaussian_mechanism(
  *, clip_norm: float, noise_multiplier: float
) -> base.Compressor:
  """Clips a vector and adds Gaussian noise to every entry of it.

  The client draws new noise in every round, from the key of its upload. In a
  mean over K clients the noise is sqrt(K) times as large as that of
  `mechanisms.private_mean`, which needs a trusted server.

  Args:
    clip_norm: bound C of the vector's L2 norm, > 0; infinite for none. A vector
      that is not finite counts as zero.
    noise_multiplier: z >= 0; the noise has a standard deviation of z C.

  Returns:
    A `Compressor` whose payload is a `Dense`, float32 or wider.

  Raises:
    ValueError: if a number is out of range, or there is noise without a bound.
  """
  mechanisms.check(clip_norm=clip_norm, noise_multiplier=noise_multiplier)

  def encode(vector, key):
    # In narrower types, rounding could exceed the bound.
    vector = vector.astype(jnp.promote_types(vector.dtype, jnp.float32))
    clipped = mechanisms.clip(vector, clip_norm)
    noisy = mechanisms.add_noise(clipped, clip_norm, noise_multiplier, key)
    return base.Dense(noisy)

  return base.stateless(encode, base.identity().decode)
