"""Codecs that transmit nothing, which every codec must beat.

A squared error alone does not tell an autoencoder from a decoder that ignores
its input: both may be near that of a constant. None of these sends anything of
a client's own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedjax_llm.codecs import measures, pca
from fedjax_llm.compression import base, wire


@wire.message(tag=18)
class Seed:
  """What a random vector of `size` entries is drawn from."""

  seed: Any
  size: int

  def check(self) -> None:
    """Raises a ValueError if the seed is none."""
    wire.require(self.seed, np.uint32, 2, "seed")


def zero(n: int) -> base.Compressor:
  """Whatever is sent, zero arrives."""
  return constant_mean(jnp.zeros(n))


def constant_mean(mean: Float[Array, " n"]) -> base.Compressor:
  """Whatever is sent, the mean of the recorded vectors arrives."""

  def encode(vector, key):
    del key  # Deterministic.
    return pca.Latent(jnp.zeros(0, jnp.float32), vector.size)

  return base.stateless(encode, lambda payload: jnp.asarray(mean))


def gaussian_noise(scale: float, n: int) -> base.Compressor:
  """Whatever is sent, noise of standard deviation `scale` arrives."""

  def encode(vector, key):
    return Seed(jax.random.bits(key, (2,), jnp.uint32), vector.size)

  def decode(payload):
    seed = jnp.asarray(payload.seed)
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return scale * jax.random.normal(key, (n,))

  return base.stateless(encode, decode)


def shuffled_clients(
  vectors: Float[Array, "clients n"], received: Float[Array, "clients n"]
) -> Float[Array, ""]:
  """The squared error, over the norm, if each had received another's vector.

  That of a codec which transmits what is a client's own is well below it; of
  one which sends everybody the same it is no lower.

  Args:
    vectors: of at least two clients of a round.
    received: what arrived of them.
  """
  other = jnp.roll(received, 1, axis=0)
  return measures.relative_squared_error(vectors.ravel(), other.ravel())
