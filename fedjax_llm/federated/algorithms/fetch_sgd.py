"""FetchSGD: clients send sketches, and the server keeps momentum and error.

Rothchild et al., "FetchSGD: Communication-Efficient Federated Learning with
Sketching", 2020 (arXiv 2007.07682), algorithm 1, and its code
(kiddyboots216/CommEfficient). A count sketch is linear: the mean of the
clients' sketches is the sketch of their mean update. So the server applies
momentum and error feedback to sketches, and clients keep no memory. In each
round the server looks up the k entries that are largest in the accumulated
sketch. It moves the parameters by these, and subtracts their sketch.

All clients and the server start with the parameters that the seed draws. A
client downloads the k-sparse moves of the rounds that it missed, or the
parameters if these are shorter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from fedjax_llm.compression import base, sketch, sparse
from fedjax_llm.federated import (
  aggregators,
  answers,
  channels,
  clients,
  downloads,
  draws,
  rounds,
)

Table = Float[Array, " cells"]


class FetchSGDState(NamedTuple):
  """What the server keeps between rounds.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters, the same at every client that is up to date.
    momentum: S_u, a sketch.
    error: S_e, the sketch of what is not yet in the parameters.
    missed: int32 [population], how many moves each client must still fetch.
  """

  round: Any
  trainable: Any
  momentum: Any
  error: Any
  missed: Any


def subtract(momentum: Table, error: Table, move: Table) -> tuple[Table, Table]:
  """Subtracts the sketch of a move from the error, as in algorithm 1."""
  return momentum, error - move


def clear(momentum: Table, error: Table, move: Table) -> tuple[Table, Table]:
  """Empties the cells that a move has touched, as in the authors' code.

  It clears these cells of the momentum as well (the momentum factor masking of
  DGC). `subtract` leaves the error of the estimate in the sketch; `clear` does
  not, but loses everything else in these cells.
  """
  empty = lambda table: jnp.where(move != 0, 0, table)
  return empty(momentum), empty(error)


def fetch_sgd(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  *,
  population: int,
  rows: int,
  columns: int,
  density: float,
  learning_rate: float = 1.0,
  momentum: float = 0.9,
  settle: Callable[[Table, Table, Table], tuple[Table, Table]] = subtract,
  seed: int = 0,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FetchSGD (algorithm 1), with a client's update in the place of a gradient.

  With one local step of `optax.sgd(1.0)` the update is the paper's gradient.
  Every client has the same weight, as in the paper.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    population: the number of clients.
    rows: the rows of a sketch, see `sketch.count_sketch`.
    columns: the columns of a sketch.
    density: k over the number of entries, in (0, 1].
    learning_rate: the server's eta, positive.
    momentum: the server's rho, in [0, 1).
    settle: `(momentum, error, sketch of the move) -> (momentum, error)`, called
      after the parameters have moved: `subtract` or `clear`.
    seed: the seed of the hash functions, known to server and clients.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if a number is out of range.
  """
  if not (learning_rate > 0 and 0 <= momentum < 1):
    raise ValueError(
      "fetch_sgd expected learning_rate > 0 and momentum in [0, 1), got"
      f" {learning_rate=}, {momentum=}."
    )
  to_server = sketch.count_sketch(rows, columns, seed=seed)
  largest = sparse.top_k(density)
  mean = aggregators.uniform_mean()
  placement = placement or clients.Placement()
  at_clients = answers.at_clients(
    clients.local_update(loss_fn, client_optimizer),
    _answer(to_server),
    lambda table, weight, shared: mean.share(table, weight, ()),
    placement=placement,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    empty, _ = to_server.encode(jnp.zeros_like(vector), (), jax.random.key(0))
    state = FetchSGDState(
      round=jnp.int32(0),
      trainable=trainable,
      momentum=empty.values,
      error=empty.values,
      missed=jnp.zeros(population, jnp.int32),
    )
    return rounds.first_state(state, placement)

  def move(state, table, key):
    """The server's part: from the mean sketch to the next state."""
    vector, unravel = ravel_pytree(state.trainable)
    velocity = momentum * state.momentum + table
    error = state.error + learning_rate * velocity
    estimate = to_server.decode(sketch.Sketch(error, rows, seed, vector.size))
    sent = base.transmit(largest, estimate.astype(vector.dtype), (), key)
    sketched, _ = to_server.encode(sent.received, (), key)
    velocity, error = settle(velocity, error, sketched.values)
    after = state._replace(
      round=state.round + 1,
      trainable=unravel(vector - sent.received),
      momentum=velocity,
      error=error,
    )
    return after, sent.payload

  def round_fn(state, frozen, examples, cohort, key):
    shared = (state.trainable, frozen)
    arrived = at_clients(state.round, shared, (), examples, cohort, key)
    table, _ = mean.finish(arrived.total, (), key)
    after, payload = move(state, table, key)
    old, missed = downloads.fetch(state.missed, cohort, arrived.weights)
    fetched, most = _fetch(old, payload, state.trainable)
    after = after._replace(missed=jnp.minimum(missed + 1, most))
    sizes = downloads.metrics(fetched)
    return rounds.end_round(state, after, arrived, sizes, placement)

  return rounds.FederatedAlgorithm(
    init,
    round_fn,
    received=lambda state, key: state.trainable,
    placement=placement,
    population=population,
  )


def _answer(to_server):
  """A client sends the sketch of its update."""

  def answer(shared, client):
    trainable, frozen = shared
    training = client.train(trainable, frozen)
    start, _ = ravel_pytree(trainable)
    update = start - ravel_pytree(training.trainable)[0]
    key = client.key(draws.Purpose.UPLOAD)
    payload, _ = to_server.encode(update, (), key)
    message = answers.message(payload.values, (), payload)
    return answers.Answer(training, update, message)

  return answer


def _fetch(missed, payload, trainable):
  """Sizes of the missed moves, or of the parameters if these are shorter.

  Args:
    missed: int32 [cohort], how many moves each client missed.
    payload: one move.
    trainable: the parameters.

  Returns:
    Bytes and entries, int32 [cohort, 2]; and the smallest number of moves that
    are not shorter than the parameters.
  """
  vector, _ = ravel_pytree(trainable)
  move, whole = (channels.sizes(x) for x in (payload, base.Dense(vector)))
  most = -(-whole[0] // move[0])
  moves = missed[:, None] * move[None]
  return jnp.where((missed < most)[:, None], moves, whole[None]), most
