"""SCAFFOLD: local training without the drift of heterogeneous clients.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning", 2020 (arXiv 1910.06378), Algorithm 1 with option II. The server has a
control variate c, an estimate of the gradient on all data; each client has c_i,
an estimate of the gradient on its own data. A client steps along its gradient
plus c - c_i, so that many local steps on its own data still lead to the optimum
on all data. The parameters and c travel down, the update and the change of c_i
travel up. Each is a separate message, so there are twice the bytes of FedAvg.
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
  local_training,
  rounds,
)


class ScaffoldState(NamedTuple):
  """What the server and the clients keep between rounds.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters that are sent and trained.
    optimizer: the server optimizer's state.
    control: c, the server's control variate, [n].
    controls: c_i, the clients' control variates, [population, n].
    download: the download compressor's states: for the parameters and for c.
    upload: the upload compressor's states, [population, ...]: for the update
      and for the change of c_i.
  """

  round: Any
  trainable: Any
  optimizer: Any
  control: Any
  controls: Any
  download: Any
  upload: Any


def scaffold(
  loss_fn: clients.LossFn,
  client_learning_rate: float,
  server_optimizer: optax.GradientTransformation,
  *,
  population: int,
  channel: channels.Channel | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """SCAFFOLD (Algorithm 1, option II).

  Every client counts once, as in the paper. A client that is left out keeps its
  c_i. A client adds to its c_i what arrived at the server, so that c stays the
  mean of all c_i under any compressor.

  Args:
    loss_fn: see `clients.local_update`.
    client_learning_rate: the rate of the clients' plain SGD, positive. The
      update is this rate times a sum of gradients, from which c_i is computed.
    server_optimizer: steps on the mean update; the paper's is
      `optax.sgd(eta_g)`.
    population: the number of clients.
    channel: how messages of both kinds are compressed; None for no compression.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if the learning rate is not positive, or the channel has
      `trains`.
  """
  if client_learning_rate <= 0:
    raise ValueError(f"scaffold expected {client_learning_rate=} > 0.")
  channel = channel or channels.Channel()
  if channel.trains is not None:
    raise ValueError(
      "scaffold trains every entry; give it a channel without `trains`."
    )
  placement = placement or clients.Placement()
  mean = aggregators.uniform_mean()

  def share(received, weight, shared):
    del shared
    update, change = received
    own = mean.share(update, weight, ())
    return own, jnp.where(weight > 0, change, 0)

  at_clients = answers.at_clients(
    _corrected(loss_fn, client_learning_rate),
    _answer(channel, client_learning_rate),
    share,
    placement=placement,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    uploads = lambda: channels.upload_states(channel, vector, population)
    state = ScaffoldState(
      round=jnp.int32(0),
      trainable=trainable,
      optimizer=server_optimizer.init(trainable),
      control=jnp.zeros_like(vector),
      controls=(),
      download=(channel.download.init(vector), channel.download.init(vector)),
      upload=(),
    )
    return rounds.first_state(
      state,
      placement,
      controls=jnp.zeros((population, vector.size), vector.dtype),
      upload=(uploads(), uploads()),
    )

  def round_fn(state, frozen, examples, cohort, key):
    messages = _broadcast(channel, state, key)
    received, download, payloads = zip(*messages, strict=True)
    shared = (state.trainable, frozen, payloads, received)
    memory = (state.controls, state.upload)
    arrived = at_clients(state.round, shared, memory, examples, cohort, key)
    share, change = arrived.total
    update, _ = mean.finish(share, (), key)
    _, unravel = ravel_pytree(state.trainable)
    after = rounds.optimizer_step(server_optimizer, state, unravel(update))
    controls, upload = arrived.memory
    after = after._replace(
      control=state.control + change / population,
      controls=controls,
      download=download,
      upload=upload,
    )
    sizes = downloads.sizes([payloads], jnp.zeros_like(cohort.clients))
    return rounds.end_round(state, after, arrived, sizes, placement)

  def received_fn(state, key):
    parameters, _ = _broadcast(channel, state, key)
    return ravel_pytree(state.trainable)[1](parameters.received)

  return rounds.FederatedAlgorithm(
    init, round_fn, received_fn, placement=placement, population=population
  )


def _broadcast(channel, state, key):
  """Returns the messages to all clients: the parameters, and c."""
  vectors = ravel_pytree(state.trainable)[0], state.control
  return [
    downloads.send(channel.download, vector, memory, state.round, key, i)
    for i, (vector, memory) in enumerate(
      zip(vectors, state.download, strict=True)
    )
  ]


def _corrected(loss_fn, learning_rate):
  """Makes SGD on gradient plus correction; a client gets it with `frozen`."""
  plain = local_training.batch_gradient(loss_fn)

  def gradient_fn(trainable, shared, *batch, trains):
    frozen, correction = shared
    gradient, sums = plain(trainable, frozen, *batch, trains=trains)
    return jax.tree.map(jnp.add, gradient, correction), sums

  return local_training.local_steps(gradient_fn, optax.sgd(learning_rate))


def _answer(channel, learning_rate):
  """A client sends its update and the change of c_i."""

  def answer(shared, client):
    trainable, frozen, payloads, (start, control) = shared
    own, memory = client.memory
    _, unravel = ravel_pytree(trainable)
    correction = unravel(control - own)
    training = client.train(unravel(start), (frozen, correction))
    update = start - ravel_pytree(training.trainable)[0]
    along = update / (learning_rate * jnp.maximum(client.steps, 1))
    # A client that took no step has learned nothing about its gradient.
    change = jnp.where(client.steps > 0, along - control, 0)
    key = client.key(draws.Purpose.UPLOAD)
    parts = zip(payloads, (update, change), memory, strict=True)
    received, states, sent = zip(
      *(
        base.transmit(channel.uplink(payload), vector, x, draws.stream(key, i))
        for i, (payload, vector, x) in enumerate(parts)
      ),
      strict=True,
    )
    kept = (own + received[1], states)
    message = answers.message(received, kept, *sent)
    return answers.Answer(training, update, message, received[0])

  return answer
