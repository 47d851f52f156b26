"""Delta downloads: clients keep what they received, and receive changes.

The server knows each client's copy of the model: it sent every change to it. It
sends a client the compressed difference between the model and the client's
copy. What one message loses is part of the next difference, so nothing is lost
for good. A client that comes back sooner has a smaller difference. This is
EF21-P (Gruntkowska, Tyurin, Richtárik, "EF21-P and Friends", 2023, arXiv
2209.15218) with a copy for every client, because only some take part in a
round.
"""

import functools

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
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the aggregated update.
    population: the number of clients.
    download: compresses the difference to a client's copy. A contraction
      without memory, such as `top_k` or `lloyd_max`. The less often clients
      take part, the more bits it needs. None for no compression.
    upload: compresses a client's update; None for no compression.
    aggregate: turns the clients' updates into one; if not given, their mean,
      with equal weights.
    placement: see `clients.Placement`; all devices if not given.

  Returns:
    The algorithm. Its state is a `rounds.ServerState` whose `upload` is a pair:
    the copies [population, n], and the upload compressor's states. `received`
    returns the server's parameters; no client has exactly these. A client that
    is left out of a round keeps its old copy, as if nothing had been sent.

  Raises:
    ValueError: from `init`, if `download` has a memory.
  """
  download = download or base.identity()
  channel = channels.Channel(upload=upload or base.identity())
  algorithm = rounds.federated_round(
    clients.local_update(loss_fn, client_optimizer),
    server_optimizer,
    channel=channel,
    aggregate=aggregate or aggregators.uniform_mean(),
    population=population,
    placement=placement,
    answer=functools.partial(_answer, download, channels.tiers_of(channel)),
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    if jax.tree.leaves(jax.eval_shape(download.init, vector)):
      raise ValueError(
        "delta_downloads expected a download without memory: a client's copy is"
        " the memory. Give the compressor itself, not error_feedback of it."
      )
    state = algorithm.init(trainable)
    copies = clients.copies(vector, population)
    copies = clients.replicate(copies, algorithm.placement)
    return state._replace(upload=(copies, state.upload))

  def round_fn(state, frozen, examples, cohort, key):
    after, metrics = algorithm.round(state, frozen, examples, cohort, key)
    vector, _ = ravel_pytree(state.trainable)
    payload, _ = jax.eval_shape(
      download.encode, vector, download.init(vector), key
    )
    tier = jnp.zeros_like(cohort.clients)
    return after, metrics | downloads.sizes([payload], tier)

  return algorithm._replace(init=init, round=round_fn)


def _answer(download, tiers, shared, client):
  """A client receives the difference between the model and its copy."""
  copy, memory = client.memory
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
  key = client.key(draws.Purpose.UPLOAD)
  message = channels.upload(tiers, shared.payloads, 0, update, memory, key)
  message = message._replace(memory=(start, message.memory))
  return answers.Answer(training, update, message, message.received)
