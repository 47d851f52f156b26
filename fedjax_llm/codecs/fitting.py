"""Fits the network of a codec to recorded updates: the second half of TGAP.

The snapshots of a step are drawn from (seed, step), so a resumed fit gives the
same result as an uninterrupted one.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm.codecs import (
  autoencoder,
  distortion,
  layouts,
  networks,
  splits,
  training,
)

Normalise = Literal["columns", "one", "none"]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a fit.

  Attributes:
    steps: maximal number of steps.
    batch_size: snapshots per step.
    learning_rate: learning rate of Adam; 2e-4 in the paper.
    normalise: divisor of images: "columns" for the root mean square of each
      column, "one" for the root mean square of all entries, or "none" for 1.
      The paper mentions no normalisation, but its network does not learn
      without one.
    held_out: fraction of the rounds, the last ones, that the codec is not
      fitted to. They decide when to stop, and the report measures them.
    evaluate_every: steps between evaluations.
    patience: number of evaluations without improvement after which to stop.
    seed: seed of the initial variables and of the batches.

  Raises:
    ValueError: if a number is not positive, or `normalise` is another word.
  """

  steps: int = 3000
  batch_size: int = 4
  learning_rate: float = 2e-4
  normalise: Normalise = "columns"
  held_out: float = 0.2
  evaluate_every: int = 100
  patience: int = 10
  seed: int = 0

  def __post_init__(self):
    for name in ("steps", "batch_size", "evaluate_every", "patience"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"fit expected {name} >= 1, got {name}={getattr(self, name)}."
        )
    if self.normalise not in ("columns", "one", "none"):
      raise ValueError(
        'fit expected normalise "columns", "one" or "none", got'
        f" normalise={self.normalise!r}."
      )


class Checkpoints(Protocol):
  """Where a fit keeps its state, such as `experiments.checkpoints`."""

  def save(self, round_number: int, state: Any) -> None:
    """Saves the state after a step."""
    ...

  def restore(self, like: Any) -> tuple[int, Any]:
    """Returns the last saved step and its state, or 0 and `like` if none."""
    ...


class _State(NamedTuple):
  """State of a fit: variables of both ends, the best ones, and a hash."""

  variables: dict[str, Any]
  optimizer: Any
  best: dict[str, Any]
  error: Any
  # Evaluations since the best one.
  stale: Any
  identity: Any


def fit(
  snapshots: np.ndarray,
  layout: layouts.Layout,
  network: networks.Network,
  settings: Settings,
  *,
  rounds: np.ndarray | None = None,
  checkpoints: Checkpoints | None = None,
  progress: Callable[[int, float, float], None] | None = None,
) -> tuple[autoencoder.Codec, distortion.Report]:
  """Fits a codec by Adam, and measures it on held-out rounds.

  Args:
    snapshots: recorded vectors in the order of time, float32 [count, n]; may be
      memory-mapped.
    layout: layout of the vectors.
    network: networks to fit.
    settings: how to fit.
    rounds: round of each snapshot, int [count]; None if unknown.
    checkpoints: store to save the state to and resume from; None to save none.
    progress: called at each evaluation with the step, its loss and the held-out
      relative squared error.

  Returns:
    The codec with the least held-out error, and its report. Look at
    `report.transmits` before using the codec.

  Raises:
    ValueError: if there are too few snapshots, they do not fit the layout, or
      `checkpoints` has the state of another fit.
  """
  if snapshots.ndim != 2 or snapshots.shape[1] != layout.size:
    raise ValueError(
      f"fit expected snapshots [count, {layout.size}], the size of the layout,"
      f" got {snapshots.shape}."
    )
  known = splits.split(snapshots, rounds, held_out=settings.held_out)
  scale = _scale(known, layout, settings.normalise)
  optimizer = optax.adam(settings.learning_rate)
  state = _init(network, layout, optimizer, known, settings)
  step_fn = jax.jit(training.step(network, layout, optimizer, scale))
  to_codec = lambda variables: autoencoder.Codec(
    layout, network, scale, **variables
  )
  received_fn = jax.jit(
    lambda variables, vectors: distortion.receiver(
      autoencoder.autoencoder(to_codec(variables))
    )(vectors)
  )

  def advance(state, number):
    random = np.random.default_rng((settings.seed, number))
    batch = snapshots[random.choice(known.train, settings.batch_size)]
    variables, memory, loss = step_fn(state.variables, state.optimizer, batch)
    return state._replace(variables=variables, optimizer=memory), loss

  def error_of(variables):
    receive = lambda vectors: received_fn(variables, vectors)
    quality = distortion.quality(receive, snapshots, known.held_out)
    return quality.relative_squared_error

  state = _loop(state, advance, error_of, settings, checkpoints, progress)
  codec = to_codec(state.best)
  return codec, distortion.report(
    autoencoder.autoencoder(codec),
    snapshots,
    known.held_out,
    mean=known.mean,
    scale=known.scale,
  )


def _loop(state, advance, error_of, settings, checkpoints, progress) -> _State:
  """Advances until all steps are done or the error no longer improves."""
  done = 0
  if checkpoints:
    identity = state.identity
    done, state = checkpoints.restore(state)
    if state.identity != identity:
      raise ValueError(
        "fit found the checkpoints of another fit. Give another folder."
      )
  for number in range(done + 1, settings.steps + 1):
    if state.stale >= settings.patience:
      break
    state, loss = advance(state, number)
    if number % settings.evaluate_every == 0 or number == settings.steps:
      error = error_of(state.variables)
      state = _best(state, error)
      if progress:
        progress(number, float(loss), error)
      if checkpoints:
        checkpoints.save(number, state)
  return state


def _best(state: _State, error: float) -> _State:
  """Returns the state after an evaluation."""
  if error < state.error:
    error, stale = jnp.float32(error), jnp.int32(0)
    return state._replace(best=state.variables, error=error, stale=stale)
  return state._replace(stale=state.stale + 1)


def _scale(known, layout, normalise) -> jax.Array:
  """Computes the divisor of images."""
  if normalise == "none":
    return jnp.ones(1)
  average = known.energy.mean()
  means = np.array([average])
  if normalise == "columns":
    energy = np.append(known.energy, 0)[layout.positions]
    count = (layout.positions < layout.size).sum(axis=0)
    means = energy.sum(axis=0) / np.maximum(count, 1)
  # A column that never moved uses the average over all entries, not zero.
  means = np.where(means > 0, means, average or 1)
  return jnp.asarray(np.sqrt(means), jnp.float32)


def _init(network, layout, optimizer, known, settings) -> _State:
  """Returns the state before the first step."""
  key = jax.random.key(settings.seed)
  variables = autoencoder.init(network, layout, key)
  return _State(
    variables,
    optimizer.init(training.parameters_of(variables)),
    variables,
    jnp.float32(math.inf),
    jnp.int32(0),
    jnp.uint32(_identity(network, layout, known, settings)),
  )


def _identity(network, layout, known, settings) -> int:
  """Returns a hash of what a fit depends on."""
  # A fit may be resumed with more steps or more patience.
  same = dataclasses.replace(settings, steps=1, patience=1)
  snapshots = (known.train, known.mean, known.energy)
  parts = (layout.digest, network, same)
  parts += tuple(zlib.crc32(x.tobytes()) for x in snapshots)
  return zlib.crc32(repr(parts).encode())
