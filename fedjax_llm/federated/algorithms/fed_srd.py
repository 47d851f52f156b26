"""FedSRD: sparse updates up, their mean product, a sparse factor down.

Yan et al., "FedSRD: Sparsify-Reconstruct-Decompose for Communication-Efficient
Federated Large Language Models Fine-Tuning", 2025 (arXiv 2510.04601), as
described in its abstract and, where that leaves a choice, as in the code
published with it (Youth-49/FedSRD_2025).

A client sends the most important entries of each matrix's update. The
importance of an entry of `a` is its magnitude times the norm of the row of the
trained `b` that multiplies it; that of an entry of `b` is its magnitude times
the norm of the column of the received `a`. The sent entries are scaled, so that
their magnitudes have the same sum as those of the whole matrix. The server
computes the mean of the clients' products and truncates it to the adapter's
rank (the variant FedSRD-e does not truncate). It then moves one factor, `a` and
`b` in turn, to bring the product nearest to this target. Random entries of the
move travel down, scaled to be unbiased; their support is sent as a seed.

Chosen here: every matrix sends the same share; the code prunes more if the
importances have a higher kurtosis. Every round sends the same number of entries
down; the code drops each with a probability. `b` moves first, because moving
`a` changes nothing while `b` is zero (the code begins with `a`, see `a_first`).
Each leaf in no pair, such as a head's, travels both ways as one more matrix,
and moves to its mean in every round. A client that missed rounds fetches the
moves of all of them, or the parameters if these are smaller. A client's first
download has all parameters.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, grouped, sparse
from fedjax_llm.federated import (
  aggregators,
  answers,
  channels,
  clients,
  downloads,
  draws,
  factors,
  parameters,
  rounds,
)


class FedSRDState(NamedTuple):
  """What the server keeps between rounds.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters, the same at every client that is up to date.
    missed: int32 [population, 2], the bytes and entries that each client must
      still fetch.
  """

  round: Any
  trainable: Any
  missed: Any


def fed_srd(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  *,
  population: int,
  upload_density: float,
  download_density: float,
  truncated: bool = True,
  a_first: bool = False,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FedSRD; clients are weighted by their numbers of examples.

  There is no server optimizer: the server steps to the mean product.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    population: the number of clients.
    upload_density: the share of each matrix's update that is sent, in (0, 1].
    download_density: the share of a factor's move that is sent, in (0, 1].
    truncated: whether the mean product is truncated to the adapter's rank
      before a factor moves towards it; False for FedSRD-e.
    a_first: whether `a` moves in even rounds and `b` in odd ones, as in the
      authors' code; else the other way round.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if a density is out of range; from `init`, if there are no
      factors.
  """
  grouped.counts_of_each([1], [upload_density])
  download = sparse.random_k(download_density)
  placement = placement or clients.Placement()
  at_clients = answers.at_clients(
    clients.local_update(loss_fn, client_optimizer),
    _answer(upload_density),
    placement=placement,
  )

  def init(trainable):
    factors.pairs(trainable)
    dense = jnp.broadcast_to(_dense(trainable), (population, 2))
    state = FedSRDState(jnp.int32(0), trainable, dense)
    return rounds.first_state(state, placement)

  def round_fn(state, frozen, examples, cohort, key):
    shared = (state.trainable, frozen)
    arrived = at_clients(state.round, shared, (), examples, cohort, key)
    weights = aggregators.normalised(arrived.weights)
    mean = aggregators.weighted_sum(arrived.own, weights)
    targets = factors.stacks(arrived.own, weights)
    pairs = factors.pairs(state.trainable)

    def move(name):
      """Moves the factors of that name, and what is in no pair."""
      moved = {
        path: factors.one_by_one(
          lambda both: _moved(both[0], both[1], name, truncated),
          (pair, targets[path]),
        )
        for path, pair in pairs.items()
      }
      other = {"a": "b", "b": "a"}[name]
      travels = lambda path: parameters.factor(path) != other
      aim, _ = parameters.split(factors.put(mean, moved), travels)
      old, fixed = parameters.split(state.trainable, travels)
      start, unravel = ravel_pytree(old)
      change = ravel_pytree(aim)[0] - start
      server_key = draws.stream(key, draws.Purpose.SERVER, state.round)
      message = base.transmit(download, change, (), server_key)
      new = parameters.combine(unravel(start + message.received), fixed)
      return new, channels.sizes(message.payload)

    is_a = (state.round % 2 == 0) == a_first
    trainable, size = jax.lax.cond(is_a, lambda: move("a"), lambda: move("b"))
    old, missed = downloads.fetch(state.missed, cohort, arrived.weights)
    missed = downloads.grow(missed, size, _dense(trainable))
    after = FedSRDState(state.round + 1, trainable, missed)
    sizes = downloads.metrics(old)
    return rounds.end_round(state, after, arrived, sizes, placement)

  return rounds.FederatedAlgorithm(
    init,
    round_fn,
    # Every client is brought up to date.
    received=lambda state, key: state.trainable,
    placement=placement,
    population=population,
  )


def _moved(pair, target, name, truncated):
  """Moves one factor of a pair to where the product is nearest the target."""
  if truncated:
    target = factors.truncate(target, pair.a.shape[-1])
  # The product of these is target minus pair; it is not formed.
  far = jnp.concatenate([target.a, -pair.a], axis=-1)
  away = jnp.concatenate([target.b, pair.b], axis=-2)
  if name == "a":
    return pair._replace(a=pair.a + far @ (away @ jnp.linalg.pinv(pair.b)))
  return pair._replace(b=pair.b + (jnp.linalg.pinv(pair.a) @ far) @ away)


def _answer(density):
  """A client sends the entries that matter most to the products."""

  def answer(shared, client):
    trainable, frozen = shared
    start, unravel = ravel_pytree(trainable)
    training = client.train(trainable, frozen)
    update = start - ravel_pytree(training.trainable)[0]
    sizes = _matrices(trainable)
    counts = grouped.counts_of_each(sizes, [density] * len(sizes))
    scores = jax.tree.map(
      lambda x, weight: jnp.abs(x) * weight,
      unravel(update),
      _importance(trainable, training.trainable),
    )
    scores, _ = ravel_pytree(scores)
    mask = grouped.largest_of_each(scores, sizes, counts)
    kept = jnp.where(mask, update, 0)
    scaled = grouped.rescale_each(kept, update, sizes)
    sender = grouped.send_mask(mask, sum(counts))
    sent = base.transmit(sender, scaled, (), client.key(draws.Purpose.UPLOAD))
    message = answers.message(sent.received, (), sent.payload)
    own = unravel(start - sent.received)
    return answers.Answer(training, update, message, sent.received, own)

  return answer


def _importance(received, trained):
  """Returns the norm that multiplies each entry's magnitude, as a tree."""

  def of(old, new):
    of_a = jnp.linalg.norm(new.b, axis=-1)[..., None, :]
    of_b = jnp.linalg.norm(old.a, axis=-2)[..., None]
    return factors.Pair(
      jnp.broadcast_to(of_a, old.a.shape), jnp.broadcast_to(of_b, old.b.shape)
    )

  new = factors.pairs(trained)
  weights = {p: of(old, new[p]) for p, old in factors.pairs(received).items()}
  return factors.put(jax.tree.map(jnp.ones_like, received), weights)


def _matrices(trainable):
  """Returns the sizes of all matrices in order; a leaf in no pair is one."""
  sizes = []
  for path, leaf in parameters.leaves(trainable):
    shape = leaf.shape[-2:] if parameters.factor(path) else leaf.shape
    size = math.prod(shape)
    sizes += [size] * (leaf.size // size)
  return sizes


def _dense(trainable):
  """Returns the bytes and entries of all parameters."""
  return channels.sizes(base.Dense(ravel_pytree(trainable)[0]))
