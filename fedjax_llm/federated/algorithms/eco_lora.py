"""EcoLoRA: clients take turns at sending segments, sparse as training goes.

Liu et al., "EcoLoRA: Communication-Efficient Federated Fine-Tuning of Large
Language Models", 2025 (arXiv 2506.02001), as described in its abstract and in
summaries: the trainable parameters are split into segments, and client i sends
segment (i + t) mod segments in round t; the server averages a segment over its
senders; `a` and `b` are sparsified by Top-K with residuals, each with its own
density that follows the training; positions are coded without loss.

Chosen here: a segment is an equal part of all `a` and an equal part of all the
rest, so that all segments have the same length; a head counts as `b`. Densities
fall exponentially with the drop in loss, from a maximum towards a minimum. The
size of a message is static, so there are only a few densities. The server
chooses one by the losses that clients report, and announces it in one byte. A
residual holds what Top-K left of the segments that a client sent. A client does
not remember the segments that it did not send, because other clients sent them.
Positions are coded like all supports (see `compression.wire`); the paper uses
Golomb codes. The download is dense by default.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Int

from fedjax_llm.compression import base, grouped
from fedjax_llm.federated import (
  answers,
  channels,
  clients,
  downloads,
  parameters,
  rounds,
)


class EcoState(NamedTuple):
  """What the server and the clients keep between rounds.

  Attributes:
    round: int32, how many rounds are done.
    trainable: the parameters that are sent and trained.
    optimizer: the server optimizer's state.
    losses: float32 [2], the mean training losses of the first and last round.
    answered: int32, the number of rounds in which a client took part.
    download: the download compressor's state, in a tuple.
    residuals: what Top-K left of clients' segments, [population, segments,
      entries of a segment].
  """

  round: Any
  trainable: Any
  optimizer: Any
  losses: Any
  answered: Any
  download: Any
  residuals: Any


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
  """EcoLoRA, with the choices above where its abstract leaves something open.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the mean update; `optax.sgd(1.0)` replaces each
      segment by its mean.
    population: the number of clients.
    segment_count: the number of segments, at least 1. If a cohort has fewer
      clients, some segments are not sent.
    a_densities: the least and the largest share of a segment's `a` that is
      sent, in (0, 1].
    b_densities: the same for everything else.
    decay: gamma >= 0. The density is the least plus the range times
      exp(-gamma (first loss - last loss)); 0 keeps the largest in all rounds.
    levels: the number of densities in the range, in [2, 256]; each is a
      compiled branch.
    download: compresses the parameters; None for no compression.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if a number is out of range.
  """
  _require(segment_count, a_densities, b_densities, decay, levels)
  placement = placement or clients.Placement()
  tiers = channels.tiers_of(channels.Channel(download or base.identity()))
  choices = [
    tuple(
      least + (most - least) * level / (levels - 1)
      for least, most in (a_densities, b_densities)
    )
    for level in range(levels)
  ]
  at_clients = answers.at_clients(
    clients.local_update(loss_fn, client_optimizer),
    _answer(segment_count, choices),
    functools.partial(_share, segment_count),
    placement=placement,
  )

  def init(trainable):
    index, _ = segments(trainable, segment_count)
    (channel,) = tiers.channels
    state = EcoState(
      round=jnp.int32(0),
      trainable=trainable,
      optimizer=server_optimizer.init(trainable),
      losses=jnp.zeros(2, jnp.float32),
      answered=jnp.int32(0),
      download=(channel.download.init(ravel_pytree(trainable)[0]),),
      residuals=(),
    )
    residuals = jnp.zeros((population, *index.shape))
    return rounds.first_state(state, placement, residuals=residuals)

  def round_fn(state, frozen, examples, cohort, key):
    sent, download = downloads.broadcast(tiers, state, frozen, key)
    drop = jnp.maximum(state.losses[0] - state.losses[1], 0)
    level = jnp.round(jnp.exp(-decay * drop) * (levels - 1)).astype(jnp.int32)
    shared = (sent, state.round, level)
    arrived = at_clients(
      state.round, shared, state.residuals, examples, cohort, key
    )
    sums, weights, report = arrived.total
    means = sums / jnp.where(weights > 0, weights, 1)[:, None]
    vector, unravel = ravel_pytree(state.trainable)
    index, _ = segments(state.trainable, segment_count)
    update = jnp.zeros_like(vector).at[index].set(means, mode="drop")
    after = rounds.optimizer_step(server_optimizer, state, unravel(update))
    loss = (report[0] / jnp.maximum(report[1], 1)).astype(jnp.float32)
    first = jnp.where(state.answered > 0, state.losses[0], loss)
    after = after._replace(
      losses=jnp.stack([first, loss]),
      answered=state.answered + 1,
      download=download,
      residuals=arrived.memory,
    )
    payloads = *sent.payloads, base.Dense(level[None].astype(jnp.uint8))
    sizes = downloads.sizes([payloads], jnp.zeros_like(cohort.clients))
    return rounds.end_round(state, after, arrived, sizes, placement)

  return rounds.FederatedAlgorithm(
    init,
    round_fn,
    downloads.received_by(lambda trainable: tiers),
    placement=placement,
    population=population,
  )


def segments(
  trainable: Any, count: int
) -> tuple[Int[np.ndarray, "segments entries"], tuple[int, ...]]:
  """Splits the flat vector into equal segments, each of which begins with `a`.

  Returns:
    The positions in the vector of each segment's entries; the vector's length
    for padding. And (entries of `a`, other entries) in a segment, with padding.
  """
  is_rest = parameters.owners(trainable) != 0
  parts = [np.flatnonzero(is_rest == x) for x in (False, True)]
  sizes = tuple(-(-part.size // count) for part in parts)
  grids = [np.full((count, size), is_rest.size, np.int32) for size in sizes]
  for grid, part in zip(grids, parts, strict=True):
    grid.flat[: part.size] = part
  return np.concatenate(grids, axis=1), sizes


def _answer(segment_count, choices):
  """A client sends the segment whose turn it is, and its loss."""

  def answer(shared, client):
    sent, round_number, level = shared
    index, sizes = segments(sent.trainable, segment_count)
    _, unravel = ravel_pytree(sent.trainable)
    (start,) = sent.received
    training = client.train(unravel(start), sent.frozen)
    # The update has all segments: if one is not finite, the client is left out.
    update = start - ravel_pytree(training.trainable)[0]
    number = (client.number + round_number) % segment_count
    segment = update.at[jnp.array(index)[number]].get(mode="fill", fill_value=0)
    target = segment + client.memory[number]
    branches = [
      functools.partial(_send_segment, sizes, each) for each in choices
    ]
    received, size = jax.lax.switch(level, branches, target)
    sums = jnp.stack([training.loss, training.count.astype(jnp.float32)])
    report = base.Dense(sums.astype(jnp.float32))
    message = channels.Message(
      (number, received, report.values),
      client.memory.at[number].set(target - received),
      *(size + channels.sizes(report)),
    )
    return answers.Answer(training, update, message)

  return answer


def _share(segment_count, received, weight, shared):
  """Returns a client's weighted segment, its weight, and its report."""
  del shared
  number, segment, report = received
  summed = lambda x: jnp.where(weight > 0, x, 0)
  rows = jnp.zeros((segment_count, segment.size), segment.dtype)
  return (
    rows.at[number].set(summed(weight * segment)),
    jnp.zeros(segment_count, weight.dtype).at[number].set(weight),
    summed(report),
  )


def _send_segment(sizes, densities, target):
  """Sends a segment with these densities of `a` and of the rest."""
  compressor = grouped.top_k_per_segment(sizes, densities)
  message = base.transmit(compressor, target, (), jax.random.key(0))
  return message.received, channels.sizes(message.payload)


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
