"""Fits the network of a codec to recorded updates: TGAP's second half.

Which snapshots a step sees is drawn from (seed, step), so that a fit which
resumes is the one that was not interrupted.
"""

import contextlib
import math
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm.codecs import (
  autoencoder,
  layouts,
  networks,
  reports,
  row_network,
  splits,
  training,
)
from fedjax_llm.experiments import checkpoints

Normalise = Literal["columns", "one", "none"]


class _State(NamedTuple):
  """Of the fit: variables of both ends, and the best ones so far."""

  variables: dict[str, Any]
  optimizer: Any
  best: dict[str, Any]
  error: Any
  # Evaluations since the best.
  stale: Any
  identity: Any


def fit(
  snapshots: np.ndarray,
  arrangement: layouts.Arrangement,
  network: networks.Network | None = None,
  *,
  rounds: np.ndarray | None = None,
  steps: int = 3000,
  batch_size: int = 4,
  learning_rate: float = 2e-4,
  normalise: Normalise = "columns",
  held_out: float = 0.2,
  evaluate_every: int = 100,
  patience: int = 10,
  seed: int = 0,
  folder: pathlib.Path | None = None,
  progress: Callable[[int, float, float], None] | None = None,
) -> tuple[autoencoder.Codec, reports.Report]:
  """Fits a codec by Adam, and measures it on rounds that it has not seen.

  Args:
    snapshots: float32 [count, n], recorded vectors in the order of time; may be
      memory-mapped.
    arrangement: of the adapter they are of.
    network: what to fit; None for `row_network.network` at half a bit an entry.
    rounds: int [count], the round of each snapshot; None if unknown.
    steps: at most.
    batch_size: snapshots a step.
    learning_rate: of Adam; 2e-4 in the paper.
    normalise: what images are divided by, and both ends know: the root mean
      square of each "columns", of all as "one", or "none". The paper says
      nothing of any; without it its network has nothing to hold on to, see
      `reports`.
    held_out: share of the rounds, the last ones, that the codec is not fitted
      to. They tell when to stop, and what the report says.
    evaluate_every: steps between evaluations.
    patience: evaluations without a better one after which to stop.
    seed: of the initial variables and the batches.
    folder: where to keep checkpoints, and resume from; None for none.
    progress: called with the step, its loss and the held-out relative squared
      error at each evaluation.

  Returns:
    The codec with the least held-out error, and its report, which is to be
    asked whether the codec `transmits`.

  Raises:
    ValueError: if there are too few snapshots, they are of another adapter, or
      `folder` has another fit.
  """
  check(
    steps=steps,
    batch_size=batch_size,
    normalise=normalise,
    evaluate_every=evaluate_every,
    patience=patience,
  )
  width = arrangement.positions.shape[1]
  network = network or row_network.network(width, latents=-(-width // 2))
  if snapshots.ndim != 2 or snapshots.shape[1] != arrangement.size:
    raise ValueError(
      f"fit expected snapshots [count, {arrangement.size}], as the arrangement"
      f" has it, got {snapshots.shape}."
    )
  known = splits.split(snapshots, rounds, held_out=held_out)
  scale = _scale(known, arrangement, normalise)
  optimizer = optax.adam(learning_rate)
  settings = (arrangement.digest, network, normalise, seed, batch_size)
  settings += (learning_rate, evaluate_every, held_out)
  # What of the snapshots is fitted to, and what they are.
  parts = (known.train, known.mean, known.energy)
  settings += tuple(zlib.crc32(x.tobytes()) for x in parts)
  state = _init(network, arrangement, optimizer, settings, seed)
  step_fn = jax.jit(training.step(network, arrangement, optimizer, scale))
  to_codec = lambda variables: autoencoder.Codec(
    arrangement, network, scale, **variables
  )
  received_fn = jax.jit(
    lambda variables, vectors: reports.receiver(
      autoencoder.autoencoder(to_codec(variables))
    )(vectors)
  )

  def advance(state, number):
    random = np.random.default_rng((seed, number))
    batch = snapshots[random.choice(known.train, batch_size)]
    variables, memory, loss = step_fn(state.variables, state.optimizer, batch)
    return state._replace(variables=variables, optimizer=memory), loss

  def error_of(variables):
    receive = lambda vectors: received_fn(variables, vectors)
    quality = reports.quality(receive, snapshots, known.held_out)
    return quality.relative_squared_error

  state = _loop(
    state,
    advance,
    error_of,
    steps=steps,
    evaluate_every=evaluate_every,
    patience=patience,
    folder=folder,
    progress=progress,
  )
  codec = to_codec(state.best)
  return codec, reports.report(
    autoencoder.autoencoder(codec),
    snapshots,
    known.held_out,
    mean=known.mean,
    scale=known.scale,
  )


def check(
  *,
  steps: int,
  batch_size: int,
  normalise: str,
  evaluate_every: int = 1,
  patience: int = 1,
) -> None:
  """Raises a `ValueError` for what `fit` would refuse, without data."""
  if min(steps, batch_size, evaluate_every, patience) < 1:
    raise ValueError(
      "fit expected positive numbers, got"
      f" {steps=}, {batch_size=}, {evaluate_every=}, {patience=}."
    )
  if normalise not in ("columns", "one", "none"):
    raise ValueError(
      f'fit expected normalise "columns", "one" or "none", got {normalise=}.'
    )


def _loop(
  state,
  advance,
  error_of,
  *,
  steps,
  evaluate_every,
  patience,
  folder,
  progress,
) -> _State:
  """Advances until `steps` are done or it gets no better; see `fit`."""
  with contextlib.ExitStack() as stack:
    keeper = None
    if folder:
      keeper = stack.enter_context(checkpoints.Checkpoints(folder))
    done, state = _resume(keeper, state) if keeper else (0, state)
    for number in range(done + 1, steps + 1):
      if state.stale >= patience:
        break
      state, loss = advance(state, number)
      if number % evaluate_every == 0 or number == steps:
        error = error_of(state.variables)
        state = _best(state, error)
        if progress:
          progress(number, float(loss), error)
        if keeper:
          keeper.save(number, state)
  return state


def _best(state: _State, error: float) -> _State:
  """The state after an evaluation."""
  if error < state.error:
    error, stale = jnp.float32(error), jnp.int32(0)
    return state._replace(best=state.variables, error=error, stale=stale)
  return state._replace(stale=state.stale + 1)


def _resume(keeper: checkpoints.Checkpoints, state: _State):
  """How many steps are done, and the state after them."""
  done, saved = keeper.restore(state)
  if saved.identity != state.identity:
    raise ValueError(
      "fit found the checkpoints of another fit. Give another folder."
    )
  return done, saved


def _scale(known, arrangement, normalise) -> jax.Array:
  """What images are divided by."""
  if normalise == "none":
    return jnp.ones(1)
  average = known.energy.mean()
  means = np.array([average])
  if normalise == "columns":
    energy = np.append(known.energy, 0)[arrangement.positions]
    count = (arrangement.positions < arrangement.size).sum(axis=0)
    means = energy.sum(axis=0) / np.maximum(count, 1)
  # What never moved is not divided by nothing.
  means = np.where(means > 0, means, average or 1)
  return jnp.asarray(np.sqrt(means), jnp.float32)


def _init(network, arrangement, optimizer, settings, seed) -> _State:
  """The state of a fit before its first step."""
  keys = jax.random.split(jax.random.key(seed))
  image = jnp.zeros((1, *arrangement.positions.shape, 1))
  shape = autoencoder.latent_shape(network, arrangement)
  variables = {
    "encoder": jax.jit(network.encoder.init)(keys[0], image),
    "decoder": jax.jit(network.decoder.init)(keys[1], jnp.zeros((1, *shape))),
  }
  return _State(
    variables,
    optimizer.init(training.parameters_of(variables)),
    variables,
    jnp.float32(math.inf),
    jnp.int32(0),
    jnp.uint32(zlib.crc32(repr(settings).encode())),
  )
