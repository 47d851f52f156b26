"""What a codec transmits of recorded updates, and whether that is anything.

An autoencoder may have a small squared error and transmit nothing: where all
clients' updates are alike, a decoder that ignores its input does as well. So a
codec is measured against codecs that do transmit nothing, see `controls`, and
by what arrives of that which tells one client from another.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.codecs import controls, measures
from fedjax_llm.compression import base, wire

# A codec of random directions, a 64th of them, has an innovation cosine of 1/8.
LEAST_INNOVATION = 0.05
# By how much the error must grow when clients are confused with each other.
LEAST_MARGIN = 1.01


class Quality(NamedTuple):
  """How well vectors arrive.

  Attributes:
    relative_squared_error: of all together, over their squared norm.
    cosine: the mean over vectors.
    innovation_cosine: see `measures`; the mean over rounds.
    aggregate_cosine: of the mean over a round's clients; the mean over rounds.
    shuffled_error: see `controls.shuffled_clients`; of all together, like the
      error that it is compared with.
  """

  relative_squared_error: float
  cosine: float
  innovation_cosine: float
  aggregate_cosine: float
  shuffled_error: float


class Report(NamedTuple):
  """What a codec learned.

  Attributes:
    codec: its quality on vectors it was not fitted on.
    controls: that of codecs which transmit nothing, by name.
    bits: of its message, header included, by entry of the vector.
  """

  codec: Quality
  controls: dict[str, Quality]
  bits: float

  @property
  def transmits(self) -> bool:
    """Whether anything of a client's own arrives, and in its own direction."""
    return not self._problems()

  @property
  def warning(self) -> str:
    """What is wrong and what to do, or nothing."""
    if self.transmits:
      return ""
    return (
      "this codec is no better than one that transmits nothing:"
      f" {'; '.join(self._problems())}. Fit another one, such as"
      " transforms.fit, or a row_network.network to layouts.ranked; normalise"
      ' its input (normalise="columns"), fit for more steps or to more updates;'
      " or send by a compressor that is not learned, such as eden(0.5,"
      " unbiased=False)."
    )

  def describe(self) -> str:
    """A table, and the warning if there is one."""
    names = ("squared error", "cosine", "innovation", "aggregate", "shuffled")
    lines = [f"{'':16}" + "".join(f"{name:>15}" for name in names)]
    for name, quality in {"codec": self.codec, **self.controls}.items():
      numbers = "".join(f"{number:15.4f}" for number in quality)
      lines.append(f"{name:16}{numbers}")
    lines.append(f"{self.bits:.3f} bits an entry.")
    return "\n".join([*lines, self.warning]).rstrip()

  def _problems(self) -> list[str]:
    codec, problems = self.codec, []
    for name in ("zero", "constant_mean"):
      error = self.controls[name].relative_squared_error
      # Written so that what is not a number is a problem.
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
    margin = LEAST_MARGIN * codec.relative_squared_error
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
  """Measures a codec against the controls.

  Args:
    compressor: of a codec; without error feedback.
    snapshots: float32 [count, n], recorded vectors.
    groups: of each round, which snapshots to measure, two or more; better none
      that the codec was fitted on.
    mean: of those that it was fitted on.
    scale: their root mean square.
  """
  n = snapshots.shape[1]
  others = {
    "zero": controls.zero(n),
    "constant_mean": controls.constant_mean(jnp.asarray(mean)),
    "gaussian_noise": controls.gaussian_noise(scale, n),
  }
  vector = jax.ShapeDtypeStruct((n,), jnp.float32)
  state = jax.eval_shape(compressor.init, vector)
  payload, _ = jax.eval_shape(
    compressor.encode, vector, state, jax.random.key(0)
  )
  measure = lambda x: quality(jax.jit(receiver(x)), snapshots, groups)
  return Report(
    measure(compressor),
    {name: measure(other) for name, other in others.items()},
    8 * wire.nbytes(payload) / n,
  )


def receiver(compressor: base.Compressor) -> Callable[[Any], jax.Array]:
  """Makes the function of what arrives of vectors [clients, n]."""

  def received(vectors):
    def one(number_and_vector):
      number, vector = number_and_vector
      key = jax.random.fold_in(jax.random.key(0), number)
      state = compressor.init(vector)
      return base.transmit(compressor, vector, state, key).received

    return jax.lax.map(one, (jnp.arange(len(vectors)), vectors))

  return received


def quality(
  received_fn: Callable[[Any], jax.Array],
  snapshots: np.ndarray,
  groups: Sequence[np.ndarray],
) -> Quality:
  """Measures what arrives of the snapshots, round by round.

  Args:
    received_fn: from vectors [clients, n] to what arrives of them.
    snapshots: float32 [count, n].
    groups: of each round, which snapshots, two or more.
  """
  errors, shuffled, energies, rows = [], [], [], []
  for members in groups:
    vectors = jnp.asarray(np.asarray(snapshots[members], np.float32))
    received = received_fn(vectors)
    errors.append(jnp.sum((vectors - received) ** 2))
    energies.append(jnp.sum(vectors**2))
    shuffled.append(controls.shuffled_clients(vectors, received))
    rows.append(
      (
        jnp.mean(measures.cosine(vectors, received)),
        measures.innovation_cosine(vectors, received),
        measures.cosine(vectors.mean(axis=0), received.mean(axis=0)),
      )
    )
  error = np.sum(errors) / np.sum(energies)
  confused = np.dot(shuffled, energies) / np.sum(energies)
  means = np.mean(np.array(rows, np.float64), axis=0)
  return Quality(*map(float, (error, *means, confused)))
