"""Measures how well a codec transmits updates, and if it transmits anything.

If the updates of all clients are alike, even a decoder that ignores its input
has a small squared error. So a codec is compared with controls, which transmit
nothing. It is also measured by how much of the innovations arrives, which are
the clients' differences from their mean, see `compression.distortion`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedjax_llm.codecs import pca
from fedjax_llm.compression import base, distortion, wire

Vectors = Float[Array, "*batch n"]
Numbers = Float[Array, "*batch"]

# Below this innovation cosine a codec counts as transmitting nothing. Random
# projections to 1/64 of the entries, which learn nothing, have a cosine of 1/8.
LEAST_INNOVATION = 0.05
# The error must grow by this factor when clients get each other's vectors.
_LEAST_MARGIN = 1.01


def relative_squared_error(vectors: Vectors, received: Vectors) -> Numbers:
  """Squared error over squared norm: 0 if exact, 1 if zero arrives."""
  return _energy(vectors - received) / _energy(vectors)


def snr_db(vectors: Vectors, received: Vectors) -> Numbers:
  """The signal-to-noise ratio in decibels: 0 if zero arrives."""
  return -10 * jnp.log10(relative_squared_error(vectors, received))


def snr_of_the_paper(vectors: Vectors, received: Vectors) -> Numbers:
  """CG-FedLLM's signal-to-noise ratio (Table 1), n times the usual one.

  It divides a sum by a mean. By this ratio, sending zero scores n, which is
  8,388,608 for LLaMA-7B. Use it only to compare with the paper.
  """
  return vectors.shape[-1] / relative_squared_error(vectors, received)


def cosine(vectors: Vectors, received: Vectors) -> Numbers:
  """The cosine between what was sent and what arrived; 0 if either is zero."""
  product = jnp.sum(vectors * received, axis=-1)
  norms = jnp.sqrt(_energy(vectors) * _energy(received))
  return jnp.where(norms > 0, product / jnp.where(norms > 0, norms, 1), 0)


def shuffled_error(
  vectors: Float[Array, "clients n"], received: Float[Array, "clients n"]
) -> Float[Array, ""]:
  """The relative squared error if each client got its neighbour's vector.

  It is well above the codec's own error if the codec transmits innovations. It
  equals the codec's own error if the same vector arrives for every client.

  Args:
    vectors: updates of two or more clients of a round.
    received: what arrived from each client.
  """
  other = jnp.roll(received, 1, axis=0)
  return relative_squared_error(vectors.ravel(), other.ravel())


def zero(n: int) -> base.Compressor:
  """A control: zero arrives, whatever is sent."""
  return constant_mean(jnp.zeros(n))


def constant_mean(mean: Float[Array, " n"]) -> base.Compressor:
  """A control: the mean of recorded vectors arrives, whatever is sent."""

  def encode(vector, key):
    del key  # Deterministic.
    return pca.Latent(jnp.zeros(0, jnp.float32), vector.size)

  return base.stateless(encode, lambda payload: jnp.asarray(mean))


def gaussian_noise(scale: float, n: int) -> base.Compressor:
  """A control: noise of standard deviation `scale` arrives."""

  def encode(vector, key):
    # The latent is the seed of the noise.
    return pca.Latent(jax.random.bits(key, (2,), jnp.uint32), vector.size)

  def decode(payload):
    seed = jnp.asarray(payload.values)
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return scale * jax.random.normal(key, (n,))

  return base.stateless(encode, decode)


class Quality(NamedTuple):
  """How well vectors arrive.

  Attributes:
    relative_squared_error: squared error of all vectors together, divided by
      their squared norm.
    cosine: `cosine` of vectors, averaged over the clients of a round and then
      over rounds.
    innovation_cosine: innovation cosine, averaged over rounds; the clients of a
      round have equal weights.
    aggregate_cosine: cosine between the mean that was sent and the mean that
      arrived, averaged over rounds.
    shuffled_error: `shuffled_error` of all vectors together.
  """

  relative_squared_error: float
  cosine: float
  innovation_cosine: float
  aggregate_cosine: float
  shuffled_error: float


class Report(NamedTuple):
  """What a codec transmits.

  Attributes:
    codec: quality on vectors that the codec was not fitted to.
    controls: quality of each control on the same vectors, by name.
    bits: length of a message, header included, in bits per vector entry.
  """

  codec: Quality
  controls: dict[str, Quality]
  bits: float

  @property
  def transmits(self) -> bool:
    """Whether the codec beats the controls and transmits innovations."""
    return not self._problems()

  @property
  def warning(self) -> str:
    """What is wrong and what to do; empty if the codec transmits."""
    if self.transmits:
      return ""
    return (
      "this codec is no better than one that transmits nothing:"
      f" {'; '.join(self._problems())}. Fit another one, such as"
      " transforms.fit, or a row_network.network to layouts.ranked; normalise"
      ' its input (normalise="columns"); fit for more steps or to more updates;'
      " or use a compressor that is not learned, such as eden(0.5,"
      " unbiased=False)."
    )

  def describe(self) -> str:
    """Returns a table, and the warning if there is one."""
    names = ("squared error", "cosine", "innovation", "aggregate", "shuffled")
    lines = [f"{'':16}" + "".join(f"{name:>15}" for name in names)]
    for name, found in {"codec": self.codec, **self.controls}.items():
      numbers = "".join(f"{number:15.4f}" for number in found)
      lines.append(f"{name:16}{numbers}")
    lines.append(f"{self.bits:.3f} bits an entry.")
    return "\n".join([*lines, self.warning]).rstrip()

  def _problems(self) -> list[str]:
    # Each comparison is written so that NaN counts as a problem.
    codec, problems = self.codec, []
    for name in ("zero", "constant_mean"):
      error = self.controls[name].relative_squared_error
      if not codec.relative_squared_error < error:
        problems.append(
          f"its relative squared error is {codec.relative_squared_error:.4f},"
          f" that of {name} {error:.4f}"
        )
    if not codec.innovation_cosine >= LEAST_INNOVATION:
      problems.append(
        f"its innovation cosine is {codec.innovation_cosine:.4f}, expected"
        f" {LEAST_INNOVATION} or more"
      )
    margin = _LEAST_MARGIN * codec.relative_squared_error
    if not codec.shuffled_error >= margin:
      problems.append(
        "clients that get each other's vectors are hardly worse off, squared"
        f" error {codec.shuffled_error:.4f}"
      )
    return problems


def report(
  compressor: base.Compressor,
  snapshots: np.ndarray,
  groups: Sequence[np.ndarray],
  *,
  mean: np.ndarray,
  scale: float,
) -> Report:
  """Measures a codec and the controls.

  Args:
    compressor: compressor of the codec, without error feedback.
    snapshots: recorded vectors, float32 [count, n].
    groups: for each round, the indices of two or more snapshots to measure;
      preferably rounds that the codec was not fitted to.
    mean: mean of the snapshots that the codec was fitted to, [n].
    scale: root mean square of the entries of these snapshots.
  """
  n = snapshots.shape[1]
  controls = {
    "zero": zero(n),
    "constant_mean": constant_mean(jnp.asarray(mean)),
    "gaussian_noise": gaussian_noise(scale, n),
  }
  measure = lambda x: quality(jax.jit(receiver(x)), snapshots, groups)
  return Report(
    measure(compressor),
    {name: measure(control) for name, control in controls.items()},
    8 * nbytes(compressor, n) / n,
  )


def nbytes(compressor: base.Compressor, n: int) -> int:
  """Returns the length in bytes of the message for a vector of `n` entries."""
  vector = jax.ShapeDtypeStruct((n,), jnp.float32)
  send = lambda x: compressor.encode(x, compressor.init(x), jax.random.key(0))
  return wire.nbytes(jax.eval_shape(send, vector)[0])


def receiver(compressor: base.Compressor) -> Callable[[Any], jax.Array]:
  """Makes a function from vectors [clients, n] to the vectors that arrive."""

  def one(number_and_vector):
    number, vector = number_and_vector
    key = jax.random.fold_in(jax.random.key(0), number)
    state = compressor.init(vector)
    return base.transmit(compressor, vector, state, key).received

  return lambda vectors: jax.lax.map(one, (jnp.arange(len(vectors)), vectors))


def quality(
  received_fn: Callable[[Any], jax.Array],
  snapshots: np.ndarray,
  groups: Sequence[np.ndarray],
) -> Quality:
  """Measures how well snapshots arrive, round by round.

  Args:
    received_fn: function from vectors [clients, n] to the vectors that arrive.
    snapshots: recorded vectors, float32 [count, n].
    groups: for each round, the indices of two or more snapshots.
  """
  errors, shuffled, energies, rows = [], [], [], []
  for members in groups:
    vectors = jnp.asarray(np.asarray(snapshots[members], np.float32))
    received = received_fn(vectors)
    shares = jax.vmap(distortion.share)(
      vectors, received, jnp.ones(len(members))
    )
    both = distortion.cosines(jax.tree.map(lambda x: x.sum(axis=0), shares))
    energies.append(jnp.sum(vectors**2))
    errors.append(jnp.sum((vectors - received) ** 2))
    shuffled.append(shuffled_error(vectors, received) * energies[-1])
    cosines = both["innovation_cosine"], both["update_cosine"]
    rows.append((jnp.mean(cosine(vectors, received)), *cosines))
  error, confused = (np.sum(x) / np.sum(energies) for x in (errors, shuffled))
  means = np.mean(np.array(rows, np.float64), axis=0)
  return Quality(*map(float, (error, *means, confused)))


def _energy(vectors):
  return jnp.sum(jnp.square(vectors), axis=-1)
