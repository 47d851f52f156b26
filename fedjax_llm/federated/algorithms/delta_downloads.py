"""Incremental downloads: clients keep what they received, and receive changes.

The server knows each client's copy of the model, for it sent all that made it,
and sends how the model differs from it now, compressed. What a message loses is
in the next difference again, so nothing is lost for good, and a difference is
the smaller the sooner a client comes back. It is EF21-P (Gruntkowska, Tyurin,
Richtárik, "EF21-P and Friends", 2023, arXiv 2209.15218) with a copy for every
client, because only some take part in a round.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import aggregators, channels, clients, draws, rounds


class IncrementalState(NamedTuple):
  """What the server keeps between rounds.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the server's parameters.
    optimizer: state of the server optimizer.
    aggregate: state of the aggregator.
    copies: [population, n], the parameters that each client has.
    upload: states of the upload compressor, [population, ...].
  """

  round: Any
  trainable: Any
  optimizer: Any
  aggregate: Any
  copies: Any
  upload: Any


def delta_downloads(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  population: int,
  download: base.Compressor | None = None,
  upload: base.Compressor | None = None,
  aggregate: aggregators.Aggregator | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Federated averaging with downloads of what changed since a client's last.

  Before its first round a client has the initial parameters, which the seed of
  the experiment draws for it. Server and clients keep a copy of the parameters
  for each client: `population * n` floats at the server.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the aggregated update.
    population: number of clients.
    download: of the difference to a client's copy, without memory; a
      contraction, such as `top_k` or `lloyd_max`. The more seldom a client
      comes back, the more bits it needs. None for all of it.
    upload: of a client's update; None for all of it.
    aggregate: from updates to one; None for the uniform mean.
    placement: see `clients.Placement`; all devices if not given.

  Returns:
    The algorithm. As each client has parameters of its own, `received` are
    those of the server, which come to nobody whole before the last round. A
    client that does not answer has not received: its copy stays.

  Raises:
    ValueError: from `init`, if `download` has a memory.
  """
  download = download or base.identity()
  aggregate = aggregate or aggregators.uniform_mean()
  channel = channels.Channel(upload=upload or base.identity())
  local_update = clients.local_update(loss_fn, client_optimizer)
  answers = clients.map_clients(
    _answer(local_update, download, channel.upload, aggregate),
    placement=placement,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    if jax.tree.leaves(jax.eval_shape(download.init, vector)):
      raise ValueError(
        "delta_downloads expected a download without memory: a client's"
        " copy is the memory. Take it out of error_feedback."
      )
    state = IncrementalState(
      round=jnp.int32(0),
      trainable=trainable,
      optimizer=server_optimizer.init(trainable),
      aggregate=aggregate.init(),
      copies=jnp.broadcast_to(vector, (population, vector.size)),
      upload=channels.upload_states(channel, vector, population),
    )
    # Copied, so that donating the state leaves the caller's arrays alone.
    return rounds.replicate(jax.tree.map(jnp.array, state), placement)

  def round_fn(state, frozen, examples, cohort, key):
    shared = (state._replace(copies=(), upload=()), frozen, examples, key)
    kept = (state.copies, state.upload)
    memory = jax.tree.map(lambda x: x[cohort.clients], kept)
    total, (memory, metrics) = answers(shared, (cohort, memory))
    share, loss, count, present = total
    put = lambda everyone, some: everyone.at[cohort.clients].set(some)
    copies, states = jax.tree.map(put, kept, memory)
    after = rounds.server_step(server_optimizer, aggregate, state, share, key)
    after = after._replace(copies=copies, upload=states)
    if not aggregate.steps_when_empty:
      after = rounds.unless_nobody(present > 0, after, state)
    return rounds.replicate(after, placement), {
      "train_loss": loss / jnp.maximum(count, 1),
      "tokens": count,
      **metrics,
    }

  received = lambda state, key: state.trainable
  return rounds.FederatedAlgorithm(
    init, round_fn, received, noise_multiplier=aggregate.noise_multiplier
  )


def _answer(
  local_update: Callable[..., clients.Training],
  download: base.Compressor,
  upload: Any,
  aggregate: aggregators.Aggregator,
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Makes the function that trains one client, for `clients.map_clients`."""

  def fn(shared, client):
    state, frozen, examples, key = shared
    cohort, (copy, upload_state) = client
    vector, unravel = ravel_pytree(state.trainable)
    of = lambda purpose: draws.stream(key, purpose, state.round, cohort.clients)
    change, memoryless = vector - copy, download.init(vector)
    down = base.transmit(
      download, change, memoryless, of(draws.Purpose.DOWNLOAD)
    )
    start = copy + down.received
    training = local_update(
      unravel(start),
      frozen,
      examples,
      cohort.indices,
      cohort.mask,
      of(draws.Purpose.TRAIN),
    )
    update = start - ravel_pytree(training.trainable)[0]
    up = base.transmit(upload, update, upload_state, of(draws.Purpose.UPLOAD))
    finite = jnp.isfinite(update).all() & jnp.isfinite(up.received).all()
    weight = jnp.where(finite, cohort.weights, 0)
    keep = lambda new, old: jnp.where(weight > 0, new, old)
    memory = jax.tree.map(keep, (start, up.state), (copy, upload_state))
    share = aggregate.share(up.received, weight, state.aggregate)
    present = (weight > 0).astype(jnp.int32)
    metrics = {
      "download_bytes": jnp.int32(wire.nbytes(down.payload)),
      "download_entries": jnp.int32(wire.entries(down.payload)),
      "upload_bytes": jnp.int32(wire.nbytes(up.payload)),
      "upload_entries": jnp.int32(wire.entries(up.payload)),
      "finite": finite,
    }
    return (share, training.loss, training.count, present), (memory, metrics)

  return fn
