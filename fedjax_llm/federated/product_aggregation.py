"""Rounds whose server aggregates the products of factors, not the factors.

The mean of the clients' products `a @ b` is not the product of the mean
factors. The server has all of them, so it can do better: decompose their mean
product anew, or add to the base model what the factors cannot hold.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import (
  channels,
  clients,
  draws,
  factors,
  gathering,
  rounds,
)
from fedjax_llm.models import lora

# Metrics are int32: sums of sizes stop here.
_LIMIT = 2**31 - 1


class State(NamedTuple):
  """What the server of a `product_round` keeps: a tree of arrays.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters that are trained.
    residual: what was added to the base model; () if nothing ever is.
    missed: int32 [population, 2], how many bytes and numbers each client has
      yet to fetch of the residual; () if there is none.
    upload: states of the upload compressor, [population, ...].
  """

  round: Any
  trainable: Any
  residual: Any
  missed: Any
  upload: Any


class Combined(NamedTuple):
  """What a server makes of the answers.

  Attributes:
    trainable: the next parameters.
    added: pairs by path, whose products go to the base model; None for none.
    forwarded: bool [cohort], whose factors are sent on to the other clients so
      that they can add the same; None for none.
  """

  trainable: Any
  added: Any = None
  forwarded: Any = None


def product_round(
  local_update: Callable[..., clients.Training],
  combine: Callable[..., Combined],
  tiers_of: Callable[[Any], channels.Tiers],
  *,
  ranks: Sequence[int] | None = None,
  scale: float | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Composes an algorithm that aggregates products of factors.

  The residual is paid for by each client when it comes: of every round that it
  missed, the factors that are forwarded or the dense change, whichever is
  smaller; at most the dense sum. A client that is left out of a round is taken
  for one that did not come. Sizes above 2 GB are counted as that.

  Args:
    local_update: see `clients.local_update`.
    combine: `(trainable, trained [cohort, ...], weights, key) -> Combined`; the
      weights are the cohort's, zero for who is left out.
    tiers_of: trainable -> how messages are compressed; downloads have no state.
    ranks: of the tiers; None if all are of full rank.
    scale: `LoRA.scale`, if products are added to the base model; else None.
    population: number of clients; needed for a residual, or if the upload keeps
      a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if `population` is missing; from `init`, if there are no
      factors or `tiers_of` refuses them.
  """
  if scale is not None and population is None:
    raise ValueError(
      "expected population, the number of clients: what each has yet to fetch"
      " of the residual is counted."
    )
  at_clients = gathering.gather(
    local_update,
    _answer(tiers_of),
    placement=placement,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    upload = tuple(
      channels.upload_states(x, vector, population)
      for x in tiers_of(trainable).channels
    )
    residual, missed = (), ()
    if scale is not None:
      zero = jax.tree.map(jnp.zeros_like, factors.pairs(trainable))
      residual = factors.products(zero)
      missed = jnp.zeros((population, 2), jnp.int32)
    # Copied, so that donating the state leaves the caller's arrays alone.
    copy = jax.tree.map(jnp.array, trainable)
    state = State(jnp.int32(0), copy, residual, missed, upload)
    return rounds.replicate(state, placement)

  def round_fn(state, frozen, examples, cohort, key):
    tiers = tiers_of(state.trainable)
    messages = [_download(x, state.trainable) for x in tiers.channels]
    payloads = tuple(x.payload for x in messages)
    received = tuple(x.received for x in messages)
    if scale is not None:
      frozen = lora.add(frozen, state.residual)
    answers = at_clients(
      state.trainable,
      state.round,
      (state.trainable, payloads, received, frozen),
      jax.tree.map(lambda x: x[cohort.clients], state.upload),
      examples,
      cohort,
      key,
    )
    combined = combine(
      state.trainable,
      answers.trained,
      answers.weights,
      draws.stream(key, draws.Purpose.SERVER, state.round),
    )
    present = answers.weights > 0
    tier = tiers.of_client(cohort.clients)
    sizes = [[wire.nbytes(x), wire.entries(x)] for x in payloads]
    down = jnp.array(sizes, jnp.int32)[tier]
    put = lambda everyone, some: everyone.at[cohort.clients].set(some)
    after = state._replace(
      round=state.round + 1,
      trainable=combined.trainable,
      upload=jax.tree.map(put, state.upload, answers.memory),
    )
    if scale is not None:
      old = state.missed[cohort.clients]
      down = _add(down, old)
      grown = factors.products(combined.added, scale)
      has = put(state.missed, jnp.where(present[:, None], 0, old))
      sent = combined.forwarded[:, None] * _sizes(state.trainable, ranks)[tier]
      after = after._replace(
        residual=jax.tree.map(jnp.add, state.residual, grown),
        missed=_fetch(has, sent, _dense(state.residual)),
      )
    after = rounds.unless_nobody(present.any(), after, state)
    metrics = {"download_bytes": down[:, 0], "download_entries": down[:, 1]}
    return rounds.replicate(after, placement), answers.metrics | metrics

  def received_fn(state, key):
    del key  # Downloads are not random.
    last = tiers_of(state.trainable).channels[-1]
    message = _download(last, state.trainable)
    return ravel_pytree(state.trainable)[1](message.received)

  residual = None if scale is None else lambda state: state.residual
  return rounds.FederatedAlgorithm(init, round_fn, received_fn, residual)


def size(count: int, dtype: Any) -> list[int]:
  """Bytes and numbers of a dense message of so many entries."""
  payload: Any = base.Dense(jax.ShapeDtypeStruct((count,), dtype))
  return [wire.nbytes(payload), count]


def _answer(tiers_of):
  """A client trains on what its tier receives, and answers as its tier does."""

  def answer(shared, train, client, memory, key):
    trainable, payloads, received, frozen = shared
    tiers = tiers_of(trainable)
    tier = tiers.of_client(client)
    start = received[0] if len(received) == 1 else jnp.stack(received)[tier]
    training = train(start, frozen)
    update = start - ravel_pytree(training.trainable)[0]
    message = channels.upload(tiers, payloads, tier, update, memory, key)
    return start, training, message

  return answer


def _download(channel, trainable):
  vector, _ = ravel_pytree(trainable)
  state = channel.download.init(vector)
  return base.transmit(channel.download, vector, state, jax.random.key(0))


def _sizes(trainable, ranks):
  """Sizes of the factors of one client of each tier: int32 [tiers, 2]."""
  vector, _ = ravel_pytree(trainable)
  owners = factors.entry_ranks(trainable)
  owners = owners[owners >= 0]
  own = ranks or [factors.rank(trainable)]
  sizes = [size(int(np.sum(owners < x)), vector.dtype) for x in own]
  return jnp.array(sizes, jnp.int32)


def _dense(residual):
  """Size of all deltas, or of a change of them: int32 [2]."""
  leaves = jax.tree.leaves(residual)
  whole = size(sum(x.size for x in leaves), leaves[0].dtype)
  return np.minimum(whole, _LIMIT).astype(np.int32)


def _fetch(missed, sent, dense):
  """What clients have yet to fetch, a round later: int32 [population, 2].

  Args:
    missed: of each client before.
    sent: sizes of what is forwarded of each client of the cohort, [cohort, 2].
    dense: size of a dense change, and of the dense sum.
  """
  none = jnp.zeros(2, jnp.int32)
  new, _ = jax.lax.scan(lambda total, x: (_add(total, x), None), none, sent)
  new = jnp.minimum(new, dense)
  return jnp.minimum(_add(missed, new[None]), dense[None])


def _add(x, y):
  return x + jnp.minimum(y, _LIMIT - x)
