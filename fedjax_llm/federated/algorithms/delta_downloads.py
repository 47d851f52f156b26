"""Delta downloads: clients keep what they received, and receive changes.

The server knows each client's copy of the model, because it sent all that made
it, and sends the compressed difference between the model and this copy. What a
message loses is part of the next difference, so nothing is lost for good, and
the sooner a client comes back, the smaller its difference is. This is EF21-P
(Gruntkowska, Tyurin, Richtárik, "EF21-P and Friends", 2023, arXiv 2209.15218)
with a copy for every client, because only some take part in a round.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  aggregators,
  answers,
  channels,
  clients,
  downloads,
  draws,
  rounds,
)


class DeltaState(NamedTuple):
  """What the server keeps between rounds.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the server's parameters.
    optimizer: the server optimizer's state.
    aggregate: the aggregator's state.
    copies: [population, n], the parameters that each client has.
    upload: the upload compressor's states, [population, ...].
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
  """Federated averaging whose downloads are changes since the last download.

  Before its first round a client has the initial parameters, which the
  experiment's seed draws. The server keeps a copy of every client's parameters:
  `population * n` floats.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the aggregated update.
    population: the number of clients.
    download: compresses the difference to a client's copy. It has no memory and
      is a contraction, such as `top_k` or `lloyd_max`. The more seldom a client
      comes back, the more bits it needs. None for no compression.
    upload: compresses a client's update; None for no compression.
    aggregate: from updates to one; the uniform mean if not given.
    placement: see `clients.Placement`; all devices if not given.

  Returns:
    The algorithm. Each client has its own parameters, so `received` returns
    the server's, which no client has exactly. A client that is left out of a
    round keeps its copy: it counts as not having received.

  Raises:
    ValueError: from `init`, if `download` has a memory.
  """
  download = download or base.identity()
  aggregate = aggregate or aggregators.uniform_mean()
  placement = placement or clients.Placement()
  channel = channels.Channel(upload=upload or base.identity())
  at_clients = answers.at_clients(
    clients.local_update(loss_fn, client_optimizer),
    _answer(download, channel.upload),
    lambda update, weight, shared: aggregate.share(
      update, weight, shared.aggregate
    ),
    placement=placement,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    if jax.tree.leaves(jax.eval_shape(download.init, vector)):
      raise ValueError(
        "delta_downloads expected a download without memory: a client's"
        " copy is the memory. Take it out of error_feedback."
      )
    state = DeltaState(
      round=jnp.int32(0),
      trainable=trainable,
      optimizer=server_optimizer.init(trainable),
      aggregate=aggregate.init(),
      copies=(),
      upload=(),
    )
    copies = jnp.tile(vector[None], (population, 1))
    upload = channels.upload_states(channel, vector, population)
    copies, upload = clients.replicate((copies, upload), placement)
    state = rounds.first_state(state, placement)
    return state._replace(copies=copies, upload=upload)

  def round_fn(state, frozen, examples, cohort, key):
    memory = (state.copies, state.upload)
    shared = Shared(state.trainable, frozen, state.aggregate)
    arrived = at_clients(state.round, shared, memory, examples, cohort, key)
    copies, upload = arrived.memory
    after = rounds.server_step(
      server_optimizer, aggregate, state, arrived.total, key
    )
    after = after._replace(copies=copies, upload=upload)
    if not aggregate.steps_when_empty:
      after = rounds.unless_nobody(arrived.weights.any(), after, state)
    vector, _ = ravel_pytree(state.trainable)
    payload, _ = jax.eval_shape(
      download.encode, vector, download.init(vector), key
    )
    sizes = downloads.sizes([payload], jnp.zeros_like(cohort.clients))
    return clients.replicate(after, placement), arrived.metrics | sizes

  return rounds.FederatedAlgorithm(
    init,
    round_fn,
    received=lambda state, key: state.trainable,
    noise_multiplier=aggregate.noise_multiplier,
    placement=placement,
  )


class Shared(NamedTuple):
  """What all clients of a round share."""

  trainable: Any
  frozen: Any
  aggregate: Any


def _answer(download, upload):
  """A client receives how the model differs from its copy."""

  def answer(shared, client):
    copy, upload_state = client.memory
    vector, unravel = ravel_pytree(shared.trainable)
    down = base.transmit(
      download,
      vector - copy,
      download.init(vector),
      client.key(draws.Purpose.DOWNLOAD),
    )
    start = copy + down.received
    training = client.train(unravel(start), shared.frozen)
    update = start - ravel_pytree(training.trainable)[0]
    up = base.transmit(
      upload, update, upload_state, client.key(draws.Purpose.UPLOAD)
    )
    message = answers.message(up.received, (start, up.state), up.payload)
    return answers.Answer(training, update, message, up.received)

  return answer
