"""Rounds whose server aggregates the products of factors, not the factors.

The mean of the clients' products `a @ b` is not the product of the mean
factors. The server has all factors, so it can decompose the mean product into
new factors, or add to the base model the part that factors cannot express.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  answers,
  channels,
  clients,
  downloads,
  draws,
  factors,
  local_training,
  rounds,
)
from fedjax_llm.models import lora


class State(NamedTuple):
  """What the server of a `product_round` keeps: a tree of arrays.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters that are trained.
    download: the download compressor's state, for each tier.
    residual: the sum that was added to the base model; () if nothing ever is.
    missed: int32 [population, 2], the bytes and entries of the residual that
      each client must still fetch; () if there is no residual.
    upload: the upload compressor's states, for each tier [population, ...].
  """

  round: Any
  trainable: Any
  download: Any
  residual: Any
  missed: Any
  upload: Any


class Combined(NamedTuple):
  """What a server computes from the answers.

  Attributes:
    trainable: the next parameters.
    added: pairs by path, whose products are added to the base model; None if
      nothing is added.
    forwarded: bool [cohort], the clients whose factors are sent to all clients,
      which compute `added` from them; None if nothing is added.
  """

  trainable: Any
  added: Any = None
  forwarded: Any = None


def product_round(
  local_update: Callable[..., local_training.Training],
  combine: Callable[..., Combined],
  tiers_of: Callable[[Any], channels.Tiers],
  *,
  ranks: Sequence[int] | None = None,
  scale: float | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Composes an algorithm that aggregates products of factors.

  A client that takes part downloads how the residual has changed since its last
  download: for every round, the forwarded factors or the dense change,
  whichever is smaller; in total at most the dense residual. A client that is
  left out of a round counts as absent.

  Args:
    local_update: see `clients.local_update`.
    combine: `(trainable, trained [cohort, ...], weights, key) -> Combined`. The
      weights are the cohort's, zero for a client that is left out.
    tiers_of: a function from the trainable parameters to the tiers.
    ranks: the rank of each tier; None if all have the full rank.
    scale: `LoRA.scale`, if products are added to the base model; else None.
    population: the number of clients; needed for a residual, or if the upload
      keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if `population` is missing; from `init`, if there are no
      factors, `tiers_of` refuses the parameters, or, with `scale`, the
      parameters and the dense residual have 2 GiB or more.
  """
  if scale is not None and population is None:
    raise ValueError(
      "expected population, the number of clients: the bytes of the residual"
      " that each must still fetch are counted."
    )
  placement = placement or clients.Placement()
  at_clients = answers.at_clients(
    local_update,
    answers.by_tier(
      tiers_of, own=lambda unravel, start, update: unravel(start - update)
    ),
    placement=placement,
  )

  def init(trainable):
    vector, _ = ravel_pytree(trainable)
    pairs = factors.pairs(trainable)
    each = tiers_of(trainable).channels
    download = tuple(x.download.init(vector) for x in each)
    upload = tuple(channels.upload_states(x, vector, population) for x in each)
    residual, missed = (), ()
    if scale is not None:
      zero = jax.tree.map(jnp.zeros_like, pairs)
      # Checked before allocation. A client may have to fetch both at once.
      whole = _whole(jax.eval_shape(factors.products, zero))
      channels.sizes(base.Dense(vector), whole)
      residual = factors.products(zero)
      missed = jnp.zeros((population, 2), jnp.int32)
    state = State(jnp.int32(0), trainable, download, (), (), ())
    return rounds.first_state(
      state, placement, residual=residual, missed=missed, upload=upload
    )

  def round_fn(state, frozen, examples, cohort, key):
    tiers = tiers_of(state.trainable)
    if scale is not None:
      frozen = lora.add(frozen, state.residual)
    shared, download = downloads.broadcast(tiers, state, frozen, key)
    arrived = at_clients(
      state.round, shared, state.upload, examples, cohort, key
    )
    combined = combine(
      state.trainable,
      arrived.own,
      arrived.weights,
      draws.stream(key, draws.Purpose.SERVER, state.round),
    )
    tier = tiers.tier_of(cohort.clients)
    sizes = downloads.sizes(shared.payloads, tier)
    after = state._replace(
      round=state.round + 1,
      trainable=combined.trainable,
      download=download,
      upload=arrived.memory,
    )
    if scale is not None:
      old, missed = downloads.fetch(state.missed, cohort, arrived.weights)
      sizes = jax.tree.map(jnp.add, sizes, downloads.metrics(old))
      grown = factors.products(combined.added, scale)
      sent = combined.forwarded[:, None] * _sizes(state.trainable, ranks)[tier]
      dense = channels.sizes(_whole(state.residual))
      grow = lambda total, size: (downloads.grow(total, size, dense), ())
      forwarded, _ = jax.lax.scan(grow, jnp.zeros(2, jnp.int32), sent)
      after = after._replace(
        residual=jax.tree.map(jnp.add, state.residual, grown),
        missed=downloads.grow(missed, forwarded, dense),
      )
    return rounds.end_round(state, after, arrived, sizes, placement)

  residual = None if scale is None else lambda state: state.residual
  return rounds.FederatedAlgorithm(
    init,
    round_fn,
    downloads.received_by(tiers_of),
    residual,
    placement=placement,
    population=population,
  )


def rank_sizes(
  owners: Int[np.ndarray, " n"], ranks: Iterable[int], dtype: Any
) -> Int[Array, "ranks 2"]:
  """Returns the bytes and entries of messages that have only the first ranks.

  Args:
    owners: the number of each entry's rank. A message of r ranks has the
      entries whose number is below r.
    ranks: the number of ranks in each message.
    dtype: the type of the entries.
  """
  counts = [int(np.sum(owners < x)) for x in ranks]
  return jnp.array([channels.sizes(_dense(x, dtype)) for x in counts])


def _sizes(trainable, ranks):
  """Returns the sizes of one client's factors, by tier: int32 [tiers, 2]."""
  vector, _ = ravel_pytree(trainable)
  owners = factors.entry_ranks(trainable)
  own = ranks or [factors.rank(trainable)]
  return rank_sizes(owners[owners >= 0], own, vector.dtype)


def _whole(residual):
  """Returns a message with the size of the dense residual."""
  leaves = jax.tree.leaves(residual)
  return _dense(sum(x.size for x in leaves), leaves[0].dtype)


def _dense(count, dtype):
  """Returns a dense message of `count` entries without values, to measure."""
  return base.Dense(jax.ShapeDtypeStruct((count,), dtype))
