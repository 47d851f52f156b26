"""Noise that clients add to uploads, so that nobody learns much from them.

All messages of a client together are (epsilon, DELTA)-DP, by Gaussian DP, for
whoever sees them, the server included. Counted is the worst that can be:

- neighbours differ in all data of a client, so that two clipped vectors are up
  to two clip norms apart;
- a client takes part in every one of the T rounds. Cohorts are drawn without
  regard to data and without replacement, so that nobody sends more often; who
  takes part is no secret, and no privacy is claimed from the draw.

So mu = 2 sqrt(T) / z. What else comes of a client's data is not accounted: how
many rows it has, metrics, and the updates on D1, of which clip norms are the
median and codecs are fitted.

Noise "before" the codec is added to the update, and what the codec makes of it
is post-processing. Noise "after" it is added to the latent, where that is of
real numbers: `LATENTS`. Quantisers send codes, to which none can be added. Of
what they quantise, EDEN and our transform code turn the update, which keeps
norms and noise as they are: after it is before it. PCA's axes are orthonormal
too, but few: noise before is as large in each coordinate of the latent as noise
after, and what differs is the norm that is clipped.
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
# Methods whose messages are of real numbers.
LATENTS = ("PCA", "paper's autoencoder")


class Noise(NamedTuple):
  """What a client adds.

  Attributes:
    clip_norm: what the vector is clipped to, the median over held-out updates.
    multiplier: the standard deviation of the noise, in clip norms.
    entries: how many numbers with noise arrive: of PCA no more than the latent
      has, wherever the noise is added.
  """

  clip_norm: float
  multiplier: float
  entries: int

  @property
  def in_mean(self) -> float:
    """The norm of the noise in a round's mean, in clip norms, about."""
    clients = problems.CLIENTS_PER_ROUND
    return self.multiplier * (self.entries / clients) ** 0.5

  @property
  def server_rate(self) -> float:
    """The step that errs least if the mean is as long as the clip norm.

    Three digits of it. It is post-processing, of what everyone knows.
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
  """The noise of so many rounds.

  Args:
    method: the name of the codec.
    codec: itself; `identity` of uncompressed uploads.
    recorded: whose held-out updates tell the clip norm.
    place: "before" the codec or "after" it.
    epsilon: of all rounds, > 0.
    rounds: T.

  Raises:
    ValueError: if there is no such place.
  """
  if place not in ("before", "after"):
    raise ValueError(f"expected place 'before' or 'after', got {place!r}.")
  if place == "after" and method not in LATENTS:
    raise ValueError(
      f"expected noise before {method}, got {place=}: its messages are not of"
      f" real numbers, as those of {', '.join(LATENTS)} are."
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
  """The codec, with noise before or after it."""
  mechanism = messages.gaussian_mechanism(
    clip_norm=noise.clip_norm, noise_multiplier=noise.multiplier
  )
  order = (mechanism, codec) if place == "before" else (codec, mechanism)
  return compression.chain(*order)
