"""A client's answer, written once: train, send, check, remember, count.

A method's function `answer` defines what one client receives, trains and sends.
`at_clients` maps it over a cohort and adds what every method needs. A client is
left out if its weight is not positive and finite, or if its update, the decoded
update or its new memory is not finite. A client that is left out adds nothing
to the server's sum and keeps its memory. (A run by `experiments.finetuning`
stops if an answer is not finite.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from fedjax_llm.compression import distortion
from fedjax_llm.federated import (
  channels,
  clients,
  downloads,
  draws,
  local_training,
)


class Client(NamedTuple):
  """One client of a cohort, as a method's `answer` sees it.

  Attributes:
    number: int32, its number in the population.
    steps: int32, how many local steps it takes.
    memory: its row of the method's memory.
    train: `(start, frozen, trains=None) -> Training`, from a tree of
      parameters, on the client's examples.
    key: `(purpose) -> key` of its random draws in this round.
  """

  number: Any
  steps: Any
  memory: Any
  train: Callable[..., local_training.Training]
  key: Callable[[draws.Purpose], Any]


class Answer(NamedTuple):
  """What one client returns.

  Attributes:
    training: the result of its local training.
    update: [n], the update before compression; usually received minus trained.
    message: what arrives, what the client would remember, and sizes.
    arrived: [n], the update as the server decodes it, to compare with
      `update`; None if the method has no such vector.
    own: a tree that the server needs from each client separately, not summed.
  """

  training: local_training.Training
  update: Any
  message: channels.Message
  arrived: Any = None
  own: Any = ()


class Answers(NamedTuple):
  """What the server has when a cohort has answered.

  Attributes:
    total: the sum of the clients' shares.
    own: `Answer.own`, [cohort, ...]; zeros for a client that is left out.
    weights: [cohort]; zero for a client that is left out.
    memory: [population, ...], the memory of all clients after the round.
    metrics: the metrics of a round, without those of downloads.
  """

  total: Any
  own: Any
  weights: Any
  memory: Any
  metrics: dict[str, Any]


def at_clients(
  local_update: Callable[..., local_training.Training],
  answer: Callable[[Any, Client], Answer],
  share: Callable[[Any, Any, Any], Any] = lambda *_: (),
  *,
  placement: clients.Placement | None = None,
) -> Callable[..., Answers]:
  """Makes the part of a round that happens at the clients.

  Only `Answer.own` and what clients remember take memory for a whole cohort.

  Args:
    local_update: see `clients.local_update`.
    answer: `(shared, client) -> Answer`.
    share: `(received, weight, shared) -> summand`, what a client adds to the
      server's sum. It must return zeros for a weight of zero. If not given,
      nothing is summed.
    placement: see `clients.Placement`; all devices if not given.

  Returns:
    `fn(number, shared, memory, examples, cohort, key) -> Answers`. `number` is
    the number of the round, `shared` is what all clients share, `memory` is
    [population, ...] and `key` is the experiment's key.
  """
  placement = placement or clients.Placement()
  mapped = clients.map_clients(
    _one_client(local_update, answer, share, placement), placement
  )

  def fn(number, shared, memory, examples, cohort, key):
    clients.check_cohort(cohort)
    rows = (cohort, take(memory, cohort.clients))
    (total, loss, count, sums), (own, weights, kept, metrics) = mapped(
      (number, shared, examples, key), rows
    )
    # Replicated, so that every device computes the whole server step. Otherwise
    # the step would be split among devices, which wait for each other.
    own, weights = clients.replicate((own, weights), placement)
    metrics |= {"train_loss": loss / jnp.maximum(count, 1), "tokens": count}
    if sums is not None:
      metrics |= distortion.cosines(sums)
    memory = put(memory, cohort.clients, kept)
    return Answers(total, own, weights, memory, metrics)

  return fn


def _one_client(local_update, answer, share, placement):
  """Makes the function of one client, for `clients.map_clients`."""

  def fn(common, row):
    number, shared, examples, key = common
    cohort, memory = row
    key_of = lambda purpose: draws.stream(key, purpose, number, cohort.clients)

    def train(start, frozen, trains=None):
      return local_update(
        start,
        frozen,
        examples,
        cohort.indices,
        cohort.mask,
        key_of(draws.Purpose.TRAIN),
        trains,
      )

    steps = cohort.mask.any(axis=1).sum()
    training, update, message, arrived, own = answer(
      shared, Client(cohort.clients, steps, memory, train, key_of)
    )
    # All are checked: a compressor may drop an infinite entry, or overflow.
    finite = _is_finite((update, message.received, message.memory))
    is_in = finite & clients.takes_part(cohort.weights)
    weight = jnp.where(is_in, cohort.weights, 0).astype(update.dtype)
    keep = lambda new, old: jnp.where(is_in, new, old)
    sums = None
    if arrived is not None and placement.has_cosines(update.size):
      sums = distortion.share(update, arrived, weight)
    total = share(message.received, weight, shared)
    return (total, training.loss, training.count, sums), (
      jax.tree.map(lambda x: jnp.where(is_in, x, 0), own),
      weight,
      jax.tree.map(keep, message.memory, memory),
      {
        "upload_bytes": message.nbytes,
        "upload_entries": message.entries,
        "finite": finite,
      },
    )

  return fn


def _is_finite(tree):
  numbers = [
    leaf
    for leaf in jax.tree.leaves(tree)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  return jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()


def take(states: Any, numbers: Int[Array, " cohort"]) -> Any:
  """Takes the clients' rows of states [population, ...]."""
  return jax.tree.map(lambda x: x[numbers], states)


def put(states: Any, numbers: Int[Array, " cohort"], rows: Any) -> Any:
  """Puts the clients' rows back into states [population, ...]."""
  return jax.tree.map(lambda x, new: x.at[numbers].set(new), states, rows)


def message(received: Any, memory: Any, *payloads: Any) -> channels.Message:
  """Returns a client's message, with the size of all payloads together."""
  nbytes, entries = jnp.array(channels.sizes(*payloads))
  return channels.Message(received, memory, nbytes, entries)


def by_tier(
  tiers_of: Callable[[Any], channels.Tiers],
  own: Callable[..., Any] = lambda *_: (),
) -> Callable[[downloads.Broadcast, Client], Answer]:
  """Makes the usual answer: train the tier's download, upload by its channel.

  Args:
    tiers_of: a function from the trainable parameters to the tiers.
    own: `(unravel, start, received) -> tree`, see `Answer.own`.
  """

  def answer(shared, client):
    tiers = tiers_of(shared.trainable)
    tier = tiers.tier_of(client.number)
    _, unravel = ravel_pytree(shared.trainable)
    of_tier = lambda each: each[0] if len(each) == 1 else jnp.stack(each)[tier]
    start = of_tier(shared.received)
    masks = shared.masks and jax.tree.map(
      jnp.bool,
      # Cast to numbers, because `unravel` returns the parameters' types.
      unravel(of_tier(shared.masks).astype(start.dtype)),
    )
    training = client.train(unravel(start), shared.frozen, masks)
    update = start - ravel_pytree(training.trainable)[0]
    sent = channels.upload(
      tiers,
      shared.payloads,
      tier,
      update,
      client.memory,
      client.key(draws.Purpose.UPLOAD),
    )
    kept = own(unravel, start, sent.received)
    return Answer(training, update, sent, sent.received, kept)

  return answer
