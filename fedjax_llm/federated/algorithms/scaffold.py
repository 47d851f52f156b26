"""SCAFFOLD: local training without the drift of heterogeneous clients.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning", 2020 (arXiv 1910.06378), Algorithm 1 with option II. The server has a
control variate c and each client one of its own, c_i: estimates of where the
gradients of all and of its own data point. A client steps along its gradient
plus c - c_i, so that many local steps on its own data still lead to the optimum
of all. Down travel the parameters and c, up the update and the change of c_i,
each as a message of its own: twice the bytes of FedAvg.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import aggregators, channels, clients, draws, rounds


class ScaffoldState(NamedTuple):
  """What the server and the clients keep between rounds.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters that are sent and trained.
    optimizer: state of the server optimizer.
    control: c, the server's control variate, [n].
    controls: c_i, those of the clients, [population, n].
    download: states of the download compressor, of the parameters and of c.
    upload: states of the upload compressor, of the update and of the change of
      c_i, [population, ...].
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

  Clients count alike, as in the paper, whatever their weights; one of weight
  zero, or that diverged, keeps its c_i. What a client adds to its c_i is what
  arrived of it, so that c stays the mean of all c_i under any compressor.

  Args:
    loss_fn: see `clients.local_update`.
    client_learning_rate: of the clients' plain SGD, positive: c_i is measured
      from the update, which is this times a sum of gradients.
    server_optimizer: steps on the mean update; the paper's is
      `optax.sgd(eta_g)`.
    population: number of clients.
    channel: what compresses the messages of both kinds; None for nothing.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if the learning rate is not positive, or the channel says what
      clients train.
  """
  if client_learning_rate <= 0:
    raise ValueError(f"scaffold expected {client_learning_rate=} > 0.")
  channel = channel or channels.Channel()
  if channel.trains is not None:
    raise ValueError(
      "scaffold trains every entry; give it a channel without `trains`."
    )
  mean = aggregators.uniform_mean()
  answers = clients.map_clients(
    _answer(loss_fn, client_learning_rate, channel, mean),
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
      controls=jnp.zeros((population, vector.size), vector.dtype),
      download=(channel.download.init(vector), channel.download.init(vector)),
      upload=(uploads(), uploads()),
    )
    # Copied, so that donating the state leaves the caller's arrays alone.
    return rounds.replicate(jax.tree.map(jnp.array, state), placement)

  def round_fn(state, frozen, examples, cohort, key):
    _, unravel = ravel_pytree(state.trainable)
    messages = _broadcast(channel, state, key)
    payloads = tuple(x.payload for x in messages)
    received = tuple(x.received for x in messages)
    shared = (state, payloads, received, frozen, examples, key)
    memory = jax.tree.map(
      lambda x: x[cohort.clients], (state.controls, state.upload)
    )
    total, (memory, metrics) = answers(shared, (cohort, memory))
    share, change, loss, count, present = total
    update, _ = mean.finish(share, (), key)
    updates, optimizer = server_optimizer.update(
      unravel(update), state.optimizer, state.trainable
    )
    controls, upload = jax.tree.map(
      lambda everyone, some: everyone.at[cohort.clients].set(some),
      (state.controls, state.upload),
      memory,
    )
    after = ScaffoldState(
      round=state.round + 1,
      trainable=optax.apply_updates(state.trainable, updates),
      optimizer=optimizer,
      control=state.control + change / population,
      controls=controls,
      download=tuple(x.state for x in messages),
      upload=upload,
    )
    after = rounds.unless_nobody(present > 0, after, state)
    each = lambda total: jnp.full(cohort.clients.shape, total, jnp.int32)
    return rounds.replicate(after, placement), {
      "train_loss": loss / jnp.maximum(count, 1),
      "tokens": count,
      "download_bytes": each(sum(wire.nbytes(x) for x in payloads)),
      "download_entries": each(sum(wire.entries(x) for x in payloads)),
      **metrics,
    }

  def received_fn(state, key):
    parameters, _ = _broadcast(channel, state, key)
    return ravel_pytree(state.trainable)[1](parameters.received)

  return rounds.FederatedAlgorithm(init, round_fn, received_fn)


def _broadcast(channel, state, key):
  """The messages to all clients: of the parameters, and of c."""
  key = draws.stream(key, draws.Purpose.DOWNLOAD, state.round)
  vectors = ravel_pytree(state.trainable)[0], state.control
  return tuple(
    base.transmit(channel.download, vector, memory, draws.stream(key, i))
    for i, (vector, memory) in enumerate(
      zip(vectors, state.download, strict=True)
    )
  )


def _answer(loss_fn, learning_rate, channel, mean):
  """Makes the function that trains one client, for `clients.map_clients`."""

  def fn(shared, client):
    state, payloads, (start, control), frozen, examples, key = shared
    cohort, (own, memory) = client
    _, unravel = ravel_pytree(state.trainable)
    correction = unravel(control - own)
    optimizer = optax.chain(
      optax.stateless(
        lambda updates, _: jax.tree.map(jnp.add, updates, correction)
      ),
      optax.sgd(learning_rate),
    )
    training = clients.local_update(loss_fn, optimizer)(
      unravel(start),
      frozen,
      examples,
      cohort.indices,
      cohort.mask,
      draws.stream(key, draws.Purpose.TRAIN, state.round, cohort.clients),
    )
    update = start - ravel_pytree(training.trainable)[0]
    steps = cohort.mask.any(axis=1).sum()
    along = update / (learning_rate * jnp.maximum(steps, 1))
    # Who took no step has learned nothing of its gradient.
    change = jnp.where(steps > 0, along - control, 0)
    key = draws.stream(key, draws.Purpose.UPLOAD, state.round, cohort.clients)
    parts = zip(payloads, (update, change), memory, strict=True)
    sent = [
      base.transmit(channel.uplink(payload), vector, x, draws.stream(key, i))
      for i, (payload, vector, x) in enumerate(parts)
    ]
    vectors = [update, change, *(x.received for x in sent)]
    finite = jnp.isfinite(jnp.stack(vectors)).all()
    weight = jnp.where(finite, cohort.weights, 0)
    keep = lambda new, old: jnp.where(weight > 0, new, old)
    arrived = jnp.where(weight > 0, sent[1].received, 0)
    states = tuple(x.state for x in sent)
    memory = jax.tree.map(keep, (own + arrived, states), (own, memory))
    share = mean.share(sent[0].received, weight, ())
    present = (weight > 0).astype(jnp.int32)
    summand = (share, arrived, training.loss, training.count, present)
    size = lambda of: jnp.int32(sum(of(x.payload) for x in sent))
    return summand, (
      memory,
      {
        "upload_bytes": size(wire.nbytes),
        "upload_entries": size(wire.entries),
        "finite": finite,
      },
    )

  return fn
