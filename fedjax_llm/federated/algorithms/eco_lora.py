"""EcoLoRA: clients take turns at sending segments, sparse as training goes.

Liu et al., "EcoLoRA: Communication-Efficient Federated Fine-Tuning of Large
Language Models", 2025 (arXiv 2506.02001), as far as its abstract and summaries
of it say. Followed are: what is trained is split in segments, of which client i
sends number (i + t) mod segments in round t; a segment is averaged over those
who sent it; `a` and `b` are sparsified by Top-K, with residuals, each with a
density of its own that follows the training; positions are coded without loss.

Chosen here: a segment is an equal part of all `a` and one of all the rest, so
that its length does not depend on its number; a head counts as `b`. Densities
fall exponentially with the loss, from a maximum towards a minimum, and because
the size of a message is static they take a few levels, which the server
announces as one byte, from the losses that clients report. A residual holds
what Top-K left of the segments that a client sent; segments whose turn it was
not are nowhere remembered, for others have sent them. Positions are the
supports of the wire, where the paper has Golomb codes, and the download is
dense unless told otherwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, segments, wire
from fedjax_llm.federated import channels, clients, draws, parameters, rounds


class EcoState(NamedTuple):
  """What the server and the clients keep between rounds.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters that are sent and trained.
    optimizer: state of the server optimizer.
    losses: mean training loss of the first round and of the last, float32 [2].
    answered: int32, in how many rounds there was anybody.
    download: state of the download compressor.
    residuals: of the clients, [population, segments, entries of a segment].
  """

  round: Any
  trainable: Any
  optimizer: Any
  losses: Any
  answered: Any
  download: Any
  residuals: Any


class Layout(NamedTuple):
  """How parameters become segments, and back.

  Attributes:
    rows: tree -> [segments, entries], of each segment first the `a`.
    tree: its inverse.
    sizes: how many entries of a segment are of `a`, and how many are not.
  """

  rows: Callable[[Any], Any]
  tree: Callable[[Any], Any]
  sizes: tuple[int, ...]


def eco_lora(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  population: int,
  segment_count: int,
  a_densities: tuple[float, float],
  b_densities: tuple[float, float],
  decay: float = 1.0,
  levels: int = 4,
  download: base.Compressor | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """EcoLoRA, with what its abstract leaves open chosen as said above.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean update; `optax.sgd(1.0)` replaces each
      segment by its mean.
    population: number of clients.
    segment_count: how many segments there are, at least 1; with a cohort of
      fewer clients some are not sent.
    a_densities: least and largest share of a segment's `a` that is sent, in
      (0, 1].
    b_densities: the same of all else.
    decay: gamma >= 0 in the density, which is the least plus the range times
      exp(-gamma (first loss - last loss)); 0 for the largest in all rounds.
    levels: how many densities there are in the range, in [2, 256]; each is a
      compiled branch.
    download: of the parameters; None for nothing.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if a number is out of range.
  """
  _require(segment_count, a_densities, b_densities, decay, levels)
  channel = channels.Channel(download or base.identity())
  choices = [
    tuple(
      least + (most - least) * level / (levels - 1)
      for least, most in (a_densities, b_densities)
    )
    for level in range(levels)
  ]
  answers = clients.map_clients(
    _answer(loss_fn, client_optimizer, segment_count, choices),
    placement=placement,
  )

  def init(trainable):
    shape = layout(trainable, segment_count).rows(trainable).shape
    state = EcoState(
      round=jnp.int32(0),
      trainable=trainable,
      optimizer=server_optimizer.init(trainable),
      losses=jnp.zeros(2, jnp.float32),
      answered=jnp.int32(0),
      download=channel.download.init(ravel_pytree(trainable)[0]),
      residuals=jnp.zeros((population, *shape)),
    )
    # Copied, so that donating the state leaves the caller's arrays alone.
    return rounds.replicate(jax.tree.map(jnp.array, state), placement)

  def round_fn(state, frozen, examples, cohort, key):
    message = _broadcast(channel, state, key)
    drop = jnp.maximum(state.losses[0] - state.losses[1], 0)
    level = jnp.round(jnp.exp(-decay * drop) * (levels - 1)).astype(jnp.int32)
    shared = (state, message.received, level, frozen, examples, key)
    memory = state.residuals[cohort.clients]
    total, (memory, metrics) = answers(shared, (cohort, memory))
    sums, weights, report, everybody, present = total
    means = sums / jnp.where(weights > 0, weights, 1)[:, None]
    updates, optimizer = server_optimizer.update(
      layout(state.trainable, segment_count).tree(means),
      state.optimizer,
      state.trainable,
    )
    loss = (report[0] / jnp.maximum(report[1], 1)).astype(jnp.float32)
    first = jnp.where(state.answered > 0, state.losses[0], loss)
    after = EcoState(
      round=state.round + 1,
      trainable=optax.apply_updates(state.trainable, updates),
      optimizer=optimizer,
      losses=jnp.stack([first, loss]),
      answered=state.answered + 1,
      download=message.state,
      residuals=state.residuals.at[cohort.clients].set(memory),
    )
    after = rounds.unless_nobody(present > 0, after, state)
    sent = message.payload, base.Dense(level[None].astype(jnp.uint8))
    each = lambda total: jnp.full(cohort.clients.shape, total, jnp.int32)
    return rounds.replicate(after, placement), {
      "train_loss": everybody[0] / jnp.maximum(everybody[1], 1),
      "tokens": everybody[1],
      "download_bytes": each(sum(map(wire.nbytes, sent))),
      "download_entries": each(sum(map(wire.entries, sent))),
      **metrics,
    }

  def received_fn(state, key):
    message = _broadcast(channel, state, key)
    return ravel_pytree(state.trainable)[1](message.received)

  return rounds.FederatedAlgorithm(init, round_fn, received_fn)


def layout(trainable: Any, segment_count: int) -> Layout:
  """How `trainable` is split in equal segments, the last filled with zeros."""
  split = lambda tree: parameters.split(
    tree, lambda path: parameters.factor(path) == "a"
  )
  flat = [ravel_pytree(part) for part in split(trainable)]
  sizes = tuple(-(-vector.size // segment_count) for vector, _ in flat)

  def rows(tree):
    parts = zip(split(tree), sizes, strict=True)
    return jnp.concatenate([grid(*part) for part in parts], axis=1)

  def grid(part, size):
    vector, _ = ravel_pytree(part)
    filled = jnp.pad(vector, (0, segment_count * size - vector.size))
    return filled.reshape(segment_count, size)

  def tree(rows):
    grids = jnp.split(rows, sizes[:1], axis=1)
    return parameters.combine(
      *(
        unravel(part.ravel()[: vector.size])
        for (vector, unravel), part in zip(flat, grids, strict=True)
      )
    )

  return Layout(rows, tree, sizes)


def _broadcast(channel, state, key):
  vector, _ = ravel_pytree(state.trainable)
  key = draws.stream(key, draws.Purpose.DOWNLOAD, state.round)
  return base.transmit(channel.download, vector, state.download, key)


def _answer(loss_fn, optimizer, segment_count, choices):
  """Makes the function that trains one client, for `clients.map_clients`."""
  local_update = clients.local_update(loss_fn, optimizer)

  def fn(shared, client):
    state, start, level, frozen, examples, key = shared
    cohort, residual = client
    split = layout(state.trainable, segment_count)
    _, unravel = ravel_pytree(state.trainable)
    start = unravel(start)
    training = local_update(
      start,
      frozen,
      examples,
      cohort.indices,
      cohort.mask,
      draws.stream(key, draws.Purpose.TRAIN, state.round, cohort.clients),
    )
    update = split.rows(jax.tree.map(jnp.subtract, start, training.trainable))
    number = (cohort.clients + state.round) % segment_count
    target = update[number] + residual[number]
    branches = [_send(split.sizes, densities) for densities in choices]
    received, nbytes, entries = jax.lax.switch(level, branches, target)
    # Of all of them: who diverged in another segment will in this one.
    finite = jnp.isfinite(update).all() & jnp.isfinite(received).all()
    weight = jnp.where(finite, cohort.weights, 0).astype(update.dtype)
    left = residual.at[number].set(target - received)
    summed = lambda x: jnp.where(weight > 0, x, 0)
    row = jnp.zeros_like(update).at[number].set(summed(weight * received))
    sums = jnp.stack([training.loss, training.count.astype(jnp.float32)])
    report = base.Dense(sums.astype(jnp.float32))
    summand = (
      row,
      jnp.zeros(segment_count, weight.dtype).at[number].set(weight),
      summed(report.values),
      (training.loss, training.count),
      (weight > 0).astype(jnp.int32),
    )
    return summand, (
      jnp.where(weight > 0, left, residual),
      {
        "upload_bytes": nbytes + wire.nbytes(report),
        "upload_entries": entries + wire.entries(report),
        "finite": finite,
      },
    )

  return fn


def _send(sizes, densities):
  """Sends a segment with these densities of `a` and of the rest."""

  def fn(target):
    compressor = segments.top_k_per_segment(sizes, densities)
    message = base.transmit(compressor, target, (), jax.random.key(0))
    numbers = wire.nbytes(message.payload), wire.entries(message.payload)
    return message.received, *map(jnp.int32, numbers)

  return fn


def _require(segment_count, a_densities, b_densities, decay, levels):
  ranges = {"a_densities": a_densities, "b_densities": b_densities}
  if not all(0 < least <= most <= 1 for least, most in ranges.values()):
    raise ValueError(
      f"eco_lora expected densities (least, largest) in (0, 1], got {ranges}."
    )
  if segment_count < 1 or decay < 0 or not 2 <= levels <= 256:
    raise ValueError(
      "eco_lora expected segment_count >= 1, decay >= 0 and levels in"
      f" [2, 256], got {segment_count=}, {decay=}, {levels=}."
    )
