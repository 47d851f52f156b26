"""The round: broadcast, local training, aggregate, server step.

Everything that is sent passes through a compressor whose payload is the
message. Parameters are trees at the clients and one flat vector on the way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import aggregators, channels, clients, draws, fidelity


class ServerState(NamedTuple):
  """What the server keeps between rounds: a tree of arrays.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters that are sent and trained.
    optimizer: state of the server optimizer.
    aggregate: state of the aggregator.
    download: state of the download compressor of each tier.
    upload: states of the upload compressor of each tier, [population, ...].
  """

  round: Any
  trainable: Any
  optimizer: Any
  aggregate: Any
  download: Any
  upload: Any


class FederatedAlgorithm(NamedTuple):
  """A federated method, as pure functions.

  Attributes:
    init: trainable -> the state, a tree of arrays with an attribute `round`,
      such as a `ServerState`.
    round: (state, frozen, examples, cohort, key) -> (state, metrics). Jit it
      with `state` donated; `key` is the experiment's, the same in all rounds.
      Metrics: `train_loss` and `tokens` of all local steps together; mostly
      too `update_cosine` and `innovation_cosine`, see `fidelity.cosines`; and
      for each client of the cohort `download_bytes` and `upload_bytes`, how
      many numbers they carry in `download_entries` and `upload_entries`, and
      whether its answer was `finite`; one that is not is left out, as is a
      client of weight zero: not in the mean, and its memory stays as it was. If
      nobody is left, the round changes nothing but its number.
    received: (state, key) -> the trainable parameters as a client would
      receive them now: for FLASC, the masked model. (The authors' masked
      evaluation has the new parameters under the mask of the round before.)
    residual: state -> what the method has added to the base model: a tree like
      that of the factors with a dense `delta` [..., inputs, outputs] in the
      place of `a` and `b`. None if it adds nothing.
    noise_multiplier: of the aggregator, see `aggregators.Aggregator`, through
      which alone `trainable` learns of clients; None if it has none, or there
      is another way.
  """

  init: Callable[[Any], Any]
  round: Callable[..., tuple[Any, dict[str, Any]]]
  received: Callable[..., Any]
  residual: Callable[[Any], Any] | None = None
  noise_multiplier: float | None = None


def federated_round(
  local_update: Callable[..., clients.Training],
  server_optimizer: optax.GradientTransformation,
  *,
  channel: channels.Channel | channels.Tiers | None = None,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> FederatedAlgorithm:
  """Composes a federated algorithm from its parts.

  Args:
    local_update: see `clients.local_update`.
    server_optimizer: steps on the aggregated update, which is received minus
      trained, so that it takes the place of a gradient.
    channel: what compresses the messages, of everybody or of each tier; None
      for nothing.
    aggregate: from updates to one; None for the weighted mean.
    population: number of clients; needed if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Returns:
    The algorithm. Its `init` raises a `ValueError` if `population` is missing.
    `received` is what the last tier receives, which should be the best one.
  """
  aggregate = aggregate or aggregators.weighted_mean()
  tiers = channels.tiers_of(channel)
  answers = clients.map_clients(
    _answer(local_update, tiers, aggregate),
    placement=placement,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    state = ServerState(
      round=jnp.int32(0),
      trainable=trainable,
      optimizer=server_optimizer.init(trainable),
      aggregate=aggregate.init(),
      download=tuple(x.download.init(vector) for x in tiers.channels),
      upload=(),
    )
    # Copied, so that donating the state leaves the caller's arrays alone.
    state = jax.tree.map(jnp.array, state)
    upload = tuple(
      channels.upload_states(x, vector, population) for x in tiers.channels
    )
    return replicate(state._replace(upload=upload), placement)

  def round_fn(state, frozen, examples, cohort, key):
    messages = [
      _broadcast(x.download, state, i, key)
      for i, x in enumerate(tiers.channels)
    ]
    payloads = tuple(x.payload for x in messages)
    received = tuple(x.received for x in messages)
    masks = channels.trains(tiers, payloads)
    light = state._replace(optimizer=(), download=(), upload=())
    shared = (light, payloads, received, masks, frozen, examples, key)
    memory = jax.tree.map(lambda x: x[cohort.clients], state.upload)
    total, (memory, metrics) = answers(shared, (cohort, memory))
    share, loss, count, present, arrived = total
    put = lambda everyone, some: everyone.at[cohort.clients].set(some)
    after = server_step(server_optimizer, aggregate, state, share, key)
    after = after._replace(
      download=tuple(x.state for x in messages),
      upload=jax.tree.map(put, state.upload, memory),
    )
    if not aggregate.steps_when_empty:
      after = unless_nobody(present > 0, after, state)
    tier = tiers.of_client(cohort.clients)
    sizes = [(wire.nbytes(x), wire.entries(x)) for x in payloads]
    nbytes, entries = jnp.array(sizes, jnp.int32).T
    return replicate(after, placement), {
      "train_loss": loss / jnp.maximum(count, 1),
      "tokens": count,
      **fidelity.cosines(arrived),
      "download_bytes": nbytes[tier],
      "download_entries": entries[tier],
      **metrics,
    }

  def received_fn(state, key):
    last = len(tiers.channels) - 1
    message = _broadcast(tiers.channels[last].download, state, last, key)
    return ravel_pytree(state.trainable)[1](message.received)

  return FederatedAlgorithm(
    init, round_fn, received_fn, noise_multiplier=aggregate.noise_multiplier
  )


def _broadcast(download, state, tier, key):
  """The message to all clients of a tier."""
  vector, _ = ravel_pytree(state.trainable)
  key = draws.stream(key, draws.Purpose.DOWNLOAD, state.round)
  # Tiers of one random compressor get messages of their own.
  key = draws.stream(key, tier) if tier else key
  return base.transmit(download, vector, state.download[tier], key)


def _answer(local_update, tiers, aggregate):
  """Makes the function that trains one client, for `clients.map_clients`."""

  def fn(shared, client):
    state, payloads, received, masks, frozen, examples, key = shared
    cohort, memory = client
    tier = tiers.of_client(cohort.clients)
    _, unravel = ravel_pytree(state.trainable)
    own = lambda each: each[0] if len(each) == 1 else jnp.stack(each)[tier]
    start = own(received)
    training = local_update(
      unravel(start),
      frozen,
      examples,
      cohort.indices,
      cohort.mask,
      draws.stream(key, draws.Purpose.TRAIN, state.round, cohort.clients),
      # Numbers, because what is unravelled gets the parameters' own types.
      masks and jax.tree.map(jnp.bool, unravel(own(masks).astype(start.dtype))),
    )
    update = start - ravel_pytree(training.trainable)[0]
    message = channels.upload(
      tiers,
      payloads,
      tier,
      update,
      memory,
      draws.stream(key, draws.Purpose.UPLOAD, state.round, cohort.clients),
    )
    # Of both: a compressor may lose what is not finite, or overflow.
    finite = jnp.isfinite(update).all() & jnp.isfinite(message.received).all()
    weight = jnp.where(finite, cohort.weights, 0)
    keep = lambda new, old: jnp.where(weight > 0, new, old)
    memory = jax.tree.map(keep, message.memory, memory)
    share = aggregate.share(message.received, weight, state.aggregate)
    present = (weight > 0).astype(jnp.int32)
    arrived = fidelity.share(update, message.received, weight)
    summand = (share, training.loss, training.count, present, arrived)
    return summand, (
      memory,
      {
        "upload_bytes": message.nbytes,
        "upload_entries": message.entries,
        "finite": finite,
      },
    )

  return fn


def server_step(
  server_optimizer: optax.GradientTransformation,
  aggregate: aggregators.Aggregator,
  state: Any,
  shares: Any,
  key: Any,
) -> Any:
  """The state one round on, by what the optimizer makes of the shares.

  Args:
    server_optimizer: steps on the aggregated update.
    aggregate: makes it of the sum of the shares.
    state: has the first four fields of a `ServerState`, which change.
    shares: their sum over the clients.
    key: of the experiment.
  """
  _, unravel = ravel_pytree(state.trainable)
  update, memory = aggregate.finish(
    shares,
    state.aggregate,
    draws.stream(key, draws.Purpose.AGGREGATE, state.round),
  )
  updates, optimizer = server_optimizer.update(
    unravel(update), state.optimizer, state.trainable
  )
  return state._replace(
    round=state.round + 1,
    trainable=optax.apply_updates(state.trainable, updates),
    optimizer=optimizer,
    aggregate=memory,
  )


def unless_nobody(is_anybody: Any, after: Any, before: Any) -> Any:
  """The state after a round, or that before it, one round on, if of nobody."""
  keep = lambda new, old: jnp.where(is_anybody, new, old)
  return jax.tree.map(keep, after, before)._replace(round=after.round)


def replicate(state: Any, placement: clients.Placement | None) -> Any:
  """Fixes where the state lives, so that every round finds it there."""
  placement = placement or clients.Placement()
  if placement.mesh.size == 1:
    return state
  return jax.lax.with_sharding_constraint(state, placement.everywhere)
