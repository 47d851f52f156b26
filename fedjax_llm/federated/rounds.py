"""The round: broadcast, local training, aggregate, server step.

Every message is the payload of a compressor. Clients train trees of parameters;
messages carry one flat vector.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.federated import (
  aggregators,
  answers,
  channels,
  clients,
  downloads,
  draws,
  local_training,
)

# A channel, the channels of all tiers, or a function from the trainable
# parameters, which decide what each entry means, to either.
AnyChannel = (
  channels.Channel
  | channels.Tiers
  | Callable[[Any], channels.Channel | channels.Tiers]
)


class ServerState(NamedTuple):
  """What the server keeps between rounds: a tree of arrays.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters that are sent and trained.
    optimizer: the server optimizer's state.
    aggregate: the aggregator's state.
    download: the download compressor's state, for each tier.
    upload: what clients remember, [population, ...]: the upload compressor's
      states, for each tier, unless the method says otherwise.
  """

  round: Any
  trainable: Any
  optimizer: Any
  aggregate: Any
  download: Any
  upload: Any


class FederatedAlgorithm(NamedTuple):
  """A federated method, as pure functions.

  To make an algorithm from another one, use `algorithm._replace(...)`, so that
  fields such as `noise_multiplier` are kept.

  Attributes:
    init: trainable -> the state, a tree of arrays with an attribute `round`,
      such as a `ServerState`.
    round: (state, frozen, examples, cohort, key) -> (state, metrics). Jit it
      with `state` donated; `key` is the experiment's, the same in all rounds.
      Metrics of the round: `train_loss` and `tokens`, over all local steps;
      with most methods `update_cosine` and `innovation_cosine`, see
      `clients.Placement`. Metrics of each client: `download_bytes`,
      `upload_bytes`, `download_entries`, `upload_entries` (the numbers in a
      message), and whether its answer is `finite`. A client whose answer is not
      finite, or whose weight is zero, is left out, see `answers`. If all are
      left out, only `round` changes, except with `steps_when_empty`.
    received: (state, key) -> the trainable parameters as a client would
      receive them now; for FLASC, the masked model. (The FLASC authors evaluate
      the new parameters under the last round's mask.)
    residual: state -> the sum added to the base model: a tree with a dense
      `delta` [..., inputs, outputs] for each `a` and `b`. None if it is empty.
    noise_multiplier: the noise of a private `aggregators.Aggregator`. None if
      it adds none, or if clients' data reach `trainable` in another way too.
    example_noise_multiplier: the noise of private local training, see
      `local_training.LocalUpdate`. None if the training is not private.
    placement: how rounds are computed; None if unknown.
    population: how many clients the state has room for; None if it remembers
      nothing of single clients.
  """

  init: Callable[[Any], Any]
  round: Callable[..., tuple[Any, dict[str, Any]]]
  received: Callable[..., Any]
  residual: Callable[[Any], Any] | None = None
  noise_multiplier: float | None = None
  example_noise_multiplier: float | None = None
  placement: clients.Placement | None = None
  population: int | None = None


def federated_round(
  local_update: Callable[..., local_training.Training],
  server_optimizer: optax.GradientTransformation,
  *,
  channel: AnyChannel | None = None,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
  answer: Callable[[Any, answers.Client], answers.Answer] | None = None,
) -> FederatedAlgorithm:
  """Composes a federated algorithm from its parts.

  Args:
    local_update: see `clients.local_update`.
    server_optimizer: steps on the aggregated update as on a gradient, because
      an update is received minus trained.
    channel: how messages are compressed, see `AnyChannel`; None for no
      compression.
    aggregate: turns the clients' updates into one; if not given, their mean,
      weighted by numbers of examples.
    population: the number of clients, if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.
    answer: what one client does with a `downloads.Broadcast`, see
      `answers.at_clients`; `answers.by_tier` if not given. The clients' memory
      is `state.upload`.

  Returns:
    The algorithm. Its `init` raises a `ValueError` if `population` is missing.
    `received` is what the last tier receives, which should be the best one.

  Raises:
    ValueError: if `server_optimizer` or `aggregate` has a wrong type.
  """
  local_training.check_optimizer("server_optimizer", server_optimizer)
  aggregate = aggregate or aggregators.weighted_mean()
  if not isinstance(aggregate, aggregators.Aggregator):
    raise ValueError(
      "expected aggregate to be an Aggregator, such as uniform_mean(), got"
      f" {aggregate!r}."
    )
  placement = placement or clients.Placement()
  tiers_of = by_trainable(channel)
  at_clients = answers.at_clients(
    local_update,
    answer or answers.by_tier(tiers_of),
    lambda update, weight, shared: aggregate.share(
      update, weight, shared.aggregate
    ),
    placement=placement,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    each = tiers_of(trainable).channels
    state = ServerState(
      round=jnp.int32(0),
      trainable=trainable,
      optimizer=server_optimizer.init(trainable),
      aggregate=aggregate.init(),
      download=tuple(x.download.init(vector) for x in each),
      upload=(),
    )
    upload = [channels.upload_states(x, vector, population) for x in each]
    return first_state(state, placement, upload=tuple(upload))

  def round_fn(state, frozen, examples, cohort, key):
    tiers = tiers_of(state.trainable)
    shared, download = downloads.broadcast(tiers, state, frozen, key)
    shared = shared._replace(aggregate=state.aggregate)
    arrived = at_clients(
      state.round, shared, state.upload, examples, cohort, key
    )
    after = server_step(server_optimizer, aggregate, state, arrived.total, key)
    after = after._replace(download=download, upload=arrived.memory)
    tier = tiers.tier_of(cohort.clients)
    sizes = downloads.sizes(shared.payloads, tier)
    before = after if aggregate.steps_when_empty else state
    return end_round(before, after, arrived, sizes, placement)

  return FederatedAlgorithm(
    init,
    round_fn,
    downloads.received_by(tiers_of),
    noise_multiplier=aggregate.noise_multiplier,
    example_noise_multiplier=getattr(
      local_update, "example_noise_multiplier", None
    ),
    placement=placement,
    population=population,
  )


def by_trainable(
  channel: AnyChannel | None,
) -> Callable[[Any], channels.Tiers]:
  """Returns a function from the trainable parameters to the tiers."""
  if callable(channel):
    return lambda trainable: channels.tiers_of(channel(trainable))
  tiers = channels.tiers_of(channel)
  return lambda trainable: tiers


def first_state(
  state: Any, placement: clients.Placement | None, **fresh: Any
) -> Any:
  """Copies a state to the devices of the placement.

  The copy protects the caller's arrays when a round donates its state.

  Args:
    state: a tree of arrays.
    placement: see `clients.Placement`; all devices if not given.
    **fresh: fields that are not copied: large ones that only the state holds.

  Raises:
    ValueError: if trainable parameters are not floating-point numbers.
  """
  trained = getattr(state, "trainable", ())
  for path, x in jax.tree.leaves_with_path(trained):
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
      raise ValueError(
        "expected trainable parameters of a floating-point type, got"
        f" {jnp.result_type(x)} at {jax.tree_util.keystr(path)}. What is not"
        " trained belongs to `frozen`."
      )
  copied = jax.tree.map(jnp.array, state)
  return clients.replicate(
    copied._replace(**fresh) if fresh else copied, placement
  )


def server_step(
  server_optimizer: optax.GradientTransformation,
  aggregate: aggregators.Aggregator,
  state: Any,
  shares: Any,
  key: Any,
) -> Any:
  """Aggregates the clients' shares and steps on the update.

  Args:
    server_optimizer: steps on the aggregated update.
    aggregate: makes the update from the sum of the shares.
    state: a state with the first four fields of a `ServerState`; these change.
    shares: the sum of the clients' shares.
    key: the experiment's key.

  Raises:
    ValueError: if `aggregate` does not return an update and its next state.
  """
  finished = aggregate.finish(
    shares,
    state.aggregate,
    draws.stream(key, draws.Purpose.AGGREGATE, state.round),
  )
  vector, unravel = ravel_pytree(state.trainable)
  shapes = functools.partial(jax.tree.map, jnp.shape)
  expected = (vector.shape, shapes(state.aggregate))
  if shapes(finished) != expected:
    raise ValueError(
      "Aggregator.finish expected to return (update, state) of shapes"
      f" {expected}, got {shapes(finished)}."
    )
  update, memory = finished
  after = optimizer_step(server_optimizer, state, unravel(update))
  return after._replace(aggregate=memory)


def optimizer_step(
  server_optimizer: optax.GradientTransformation, state: Any, update: Any
) -> Any:
  """Steps on an update.

  Args:
    server_optimizer: steps on the update as on a gradient.
    state: a state with the first three fields of a `ServerState`; these change.
    update: a tree like `state.trainable`.
  """
  updates, optimizer = server_optimizer.update(
    update, state.optimizer, state.trainable
  )
  return state._replace(
    round=state.round + 1,
    trainable=optax.apply_updates(state.trainable, updates),
    optimizer=optimizer,
  )


def end_round(
  before: Any,
  after: Any,
  arrived: answers.Answers,
  sizes: dict[str, Any],
  placement: clients.Placement,
) -> tuple[Any, dict[str, Any]]:
  """Returns the next state and the metrics of a round.

  If no client took part, keeps `before` and increments `round`.

  Args:
    before: the state before the round.
    after: the state after the round, if a client took part.
    arrived: what `answers.at_clients` returned.
    sizes: the metrics of the downloads.
    placement: see `clients.Placement`.
  """
  keep = lambda new, old: jnp.where(arrived.weights.any(), new, old)
  kept = jax.tree.map(keep, after, before)._replace(round=after.round)
  return clients.replicate(kept, placement), arrived.metrics | sizes
