"""Noise that clients add to uploads, for differential privacy of messages.

All messages of a client together are (epsilon, DELTA)-DP, by Gaussian DP, for
anyone who sees them, including the server. The accounting is for the worst
case:

- Neighbouring data sets differ in all data of a client, so two clipped vectors
  can be two clip norms apart.
- A client takes part in all T rounds. It cannot take part more often, because a
  cohort is drawn without replacement. Who takes part is public, and sampling is
  not counted as privacy.

So mu = 2 sqrt(T) / z, where z is the noise multiplier. Not accounted are a
client's number of rows, metrics, and the updates on D1, to which codecs are
fitted and whose median norm is the clip norm.

Noise "before" the codec is added to the update; the codec is post-processing.
Noise "after" the codec is added to the latent of the codecs in `LATENTS`, whose
messages are real numbers. Quantisers send integer codes, to which no noise can
be added. EDEN and our transform code rotate the update before they quantise,
which preserves norms and noise: noise after the rotation equals noise before
it. PCA projects to a few orthonormal axes: noise before and noise after have
the same size in each coordinate of the latent, but the clipped norms differ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import problems
from benchmarks.cg_fedllm import recordings
from fedjax_llm import compression
from fedjax_llm.compression import base
from fedjax_llm.federated.privacy import gaussian, messages

DELTA = 1e-5
# Methods whose messages are real numbers.
LATENTS = ("PCA", "paper's autoencoder")


class Noise(NamedTuple):
  """What a client adds.

  Attributes:
    clip_norm: clip norm, the median norm of held-out updates.
    multiplier: standard deviation of the noise, in clip norms.
    entries: number of noisy numbers that arrive. With PCA it is the size of the
      latent, also if the noise is added before.
  """

  clip_norm: float
  multiplier: float
  entries: int

  @property
  def in_mean(self) -> float:
    """The approximate norm of the noise in a round's mean, in clip norms."""
    clients = problems.CLIENTS_PER_ROUND
    return self.multiplier * (self.entries / clients) ** 0.5

  @property
  def server_rate(self) -> float:
    """The server rate of least error if the norm of the mean is the clip norm.

    It is rounded to three digits. It depends on public numbers only.
    """
    return float(f"{1 / (1 + self.in_mean**2):.3g}")


def of(
  method: str,
  codec: base.Compressor,
  recorded: recordings.Recorded,
  *,
  place: str,
  epsilon: float,
  rounds: int,
) -> Noise:
  """Returns the noise that makes `rounds` messages private.

  Args:
    method: name of the codec.
    codec: the codec; `identity` for uncompressed uploads.
    recorded: recording whose held-out updates give the clip norm.
    place: "before" the codec or "after" it.
    epsilon: epsilon of all rounds together, positive.
    rounds: number of rounds, T.

  Raises:
    ValueError: if `place` is another word, or the codec's messages are not real
      numbers and `place` is "after".
  """
  if place not in ("before", "after"):
    raise ValueError(f"expected place 'before' or 'after', got {place!r}.")
  if place == "after" and method not in LATENTS:
    raise ValueError(
      f"expected noise before {method}, got {place=}: its messages are not real"
      f" numbers, as those of {', '.join(LATENTS)} are."
    )
  vectors = recorded.store.snapshots[np.concatenate(recorded.groups)]
  latents = vectors
  if method in LATENTS:
    encode = lambda x: codec.encode(x, codec.init(x), jax.random.key(0))[0]
    latents = jax.lax.map(lambda x: encode(x).values, jnp.asarray(vectors))
  clipped = vectors if place == "before" else latents
  norms = np.linalg.norm(np.asarray(clipped), axis=1)
  one = gaussian.noise_multiplier_for(epsilon, DELTA, rounds)
  return Noise(float(np.median(norms)), 2 * one, latents.shape[1])


def added(noise: Noise, codec: base.Compressor, place: str) -> base.Compressor:
  """Returns the codec with noise before or after it."""
  mechanism = messages.gaussian_mechanism(
    clip_norm=noise.clip_norm, noise_multiplier=noise.multiplier
  )
  order = (mechanism, codec) if place == "before" else (codec, mechanism)
  return compression.chain(*order)
