"""FetchSGD: clients send sketches, and the server keeps momentum and error.

Rothchild et al., "FetchSGD: Communication-Efficient Federated Learning with
Sketching", 2020 (arXiv 2007.07682), algorithm 1, and its code
(kiddyboots216/CommEfficient). As a count sketch is linear, the mean of the
clients' sketches is that of their mean update, and momentum and error feedback
can be carried out on sketches, at the server: clients keep no memory. In each
round the server looks up the k entries that are largest in the accumulated
sketch; these move the parameters, and their sketch is taken out of it.

All clients and the server start with the parameters that the seed draws. Down
travel the k-sparse moves of the rounds that a client has missed, or the
parameters if these are shorter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from fedjax_llm.compression import base, sketch, sparse, wire
from fedjax_llm.federated import aggregators, clients, draws, rounds

Table = Float[Array, " cells"]


class FetchSGDState(NamedTuple):
  """What the server keeps between rounds.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters, the same at every client that is up to date.
    momentum: S_u, a sketch.
    error: S_e, a sketch of all that has yet to move the parameters.
    missed: int32 [population], how many moves each client has yet to fetch.
  """

  round: Any
  trainable: Any
  momentum: Any
  error: Any
  missed: Any


def subtract(momentum: Table, error: Table, move: Table) -> tuple[Table, Table]:
  """Takes the sketch of a move out of the error, as algorithm 1 has it."""
  return momentum, error - move


def clear(momentum: Table, error: Table, move: Table) -> tuple[Table, Table]:
  """Empties the cells that a move has touched, as the authors' code has it.

  Momentum as well: the factor masking of DGC. The error of a move, which is
  never subtracted exactly, then does not come back; what else was in the cells
  is lost.
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

  One local step of `optax.sgd(1.0)` sends the paper's gradient. Clients count
  alike, as in the paper, whatever their weights.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    population: number of clients.
    rows: of a sketch, see `sketch.count_sketch`.
    columns: of a sketch.
    density: k over the number of entries, in (0, 1].
    learning_rate: eta of the server, positive.
    momentum: rho of the server, in [0, 1).
    settle: `(momentum, error, sketch of the move) -> (momentum, error)`, what
      is left of both once the parameters have moved: `subtract` or `clear`.
    seed: of the hashes, which everybody knows.
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
  answers = clients.map_clients(
    _answer(clients.local_update(loss_fn, client_optimizer), to_server, mean),
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
    # Copied, so that donating the state leaves the caller's arrays alone.
    return rounds.replicate(jax.tree.map(jnp.array, state), placement)

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
    shared = (state.trainable, state.round, frozen, examples, key)
    (share, loss, count), (present, metrics) = answers(shared, cohort)
    table, _ = mean.finish(share, (), key)
    after, payload = move(state, table, key)
    missed = state.missed[cohort.clients]
    fetched, most = _fetch(missed, payload, state.trainable)
    missed = jnp.where(present, 0, missed)
    missed = state.missed.at[cohort.clients].set(missed)
    after = after._replace(missed=jnp.minimum(missed + 1, most))
    after = rounds.unless_nobody(present.any(), after, state)
    return rounds.replicate(after, placement), {
      "train_loss": loss / jnp.maximum(count, 1),
      "tokens": count,
      "download_bytes": fetched[:, 0],
      "download_entries": fetched[:, 1],
      **metrics,
    }

  received = lambda state, key: state.trainable
  return rounds.FederatedAlgorithm(init, round_fn, received)


def _answer(local_update, to_server, mean):
  """Makes the function that trains one client, for `clients.map_clients`."""

  def fn(shared, cohort):
    trainable, number, frozen, examples, key = shared
    training = local_update(
      trainable,
      frozen,
      examples,
      cohort.indices,
      cohort.mask,
      draws.stream(key, draws.Purpose.TRAIN, number, cohort.clients),
    )
    start, _ = ravel_pytree(trainable)
    update = start - ravel_pytree(training.trainable)[0]
    payload, _ = to_server.encode(update, (), key)
    # Of both: a sum may overflow.
    finite = jnp.isfinite(update).all() & jnp.isfinite(payload.values).all()
    weight = jnp.where(finite, cohort.weights, 0)
    share = mean.share(payload.values, weight, ())
    return (share, training.loss, training.count), (
      weight > 0,
      {
        "upload_bytes": jnp.int32(wire.nbytes(payload)),
        "upload_entries": jnp.int32(wire.entries(payload)),
        "finite": finite,
      },
    )

  return fn


def _fetch(missed, payload, trainable):
  """What fetching so many moves takes, or the parameters if that is less.

  Args:
    missed: how many moves, int32 [cohort].
    payload: of one move.
    trainable: the parameters.

  Returns:
    Bytes and numbers, int32 [cohort, 2]; and how many moves are too many.
  """
  vector, _ = ravel_pytree(trainable)
  move, whole = (
    np.array([wire.nbytes(x), wire.entries(x)], np.int32)
    for x in (payload, base.Dense(vector))
  )
  most = -(-whole[0] // move[0])
  moves = missed[:, None] * move[None]
  return jnp.where((missed < most)[:, None], moves, whole[None]), most
