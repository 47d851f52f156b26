"""Downloads: what the server sends at the start of a round, and its size."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from fedjax_llm.compression import base
from fedjax_llm.federated import channels, clients, draws


class Broadcast(NamedTuple):
  """What all clients of a round share.

  Attributes:
    trainable: the server's parameters.
    frozen: what every client already has.
    payloads: the download of each tier.
    received: [n], what each tier decodes.
    masks: which entries each tier trains; None for all.
    aggregate: the aggregator's state.
  """

  trainable: Any
  frozen: Any
  payloads: Sequence[Any]
  received: Sequence[Any]
  masks: Any
  aggregate: Any = ()


def send(
  compressor: base.Compressor,
  vector: Float[Array, " n"],
  state: Any,
  round_number: Int[Array, ""],
  key: Any,
  *stream: int,
) -> base.Transmission:
  """Sends a vector from the server to all clients.

  Args:
    compressor: the compressor of the message.
    vector: the vector to send.
    state: the compressor's state.
    round_number: the number of the round.
    key: the experiment's key.
    *stream: numbers that tell the messages of one round apart.
  """
  key = draws.stream(key, draws.Purpose.DOWNLOAD, round_number, *stream)
  return base.transmit(compressor, vector, state, key)


def broadcast(
  tiers: channels.Tiers, state: Any, frozen: Any, key: Any
) -> tuple[Broadcast, tuple[Any, ...]]:
  """Sends the parameters to every tier.

  Args:
    tiers: the channels of all tiers.
    state: the server's state, with `round`, `trainable` and `download` (the
      state of each tier's download compressor).
    frozen: what every client already has.
    key: the experiment's key.

  Returns:
    The broadcast, and the new states of the download compressors.
  """
  vector, _ = ravel_pytree(state.trainable)
  # Each tier has its own stream: random compressors differ between tiers.
  messages = [
    send(x.download, vector, memory, state.round, key, *([i] if i else []))
    for i, (x, memory) in enumerate(
      zip(tiers.channels, state.download, strict=True)
    )
  ]
  received, after, payloads = zip(*messages, strict=True)
  masks = channels.trains(tiers, payloads)
  return Broadcast(state.trainable, frozen, payloads, received, masks), after


def received_by(
  tiers_of: Callable[[Any], channels.Tiers],
) -> Callable[[Any, Any], Any]:
  """Makes a function from (state, key) to what the last tier receives.

  Args:
    tiers_of: a function from the trainable parameters to the tiers.
  """

  def received_fn(state, key):
    tiers = tiers_of(state.trainable)
    shared, _ = broadcast(tiers, state, (), key)
    return ravel_pytree(state.trainable)[1](shared.received[-1])

  return received_fn


def sizes(sent: Sequence[Any], tier: Int[Array, " cohort"]) -> dict[str, Any]:
  """Returns the metrics of the downloads.

  Args:
    sent: what each tier receives: a payload, or a tuple of payloads.
    tier: the tier number of each client in the cohort.
  """
  payloads = [x if isinstance(x, tuple) else (x,) for x in sent]
  return metrics(jnp.array([channels.sizes(*x) for x in payloads])[tier])


def metrics(each: Int[Array, "cohort 2"]) -> dict[str, Any]:
  """Returns the metrics, given each client's download in bytes and entries."""
  return {"download_bytes": each[:, 0], "download_entries": each[:, 1]}


def fetch(
  missed: Int[Array, "population ..."],
  cohort: clients.Cohort,
  weights: Float[Array, " cohort"],
) -> tuple[Int[Array, "cohort ..."], Int[Array, "population ..."]]:
  """Brings the clients of a cohort up to date.

  Args:
    missed: what each client must still fetch.
    cohort: the clients that fetch.
    weights: the clients' weights. A client of weight zero is left out, and must
      fetch the same again.

  Returns:
    What each client of the cohort fetches, and the next `missed`.
  """
  old = missed[cohort.clients]
  is_in = jnp.expand_dims(weights > 0, range(1, old.ndim))
  kept = jnp.where(is_in, 0, old)
  return old, missed.at[cohort.clients].set(kept)


def grow(
  missed: Int[Array, "... 2"], size: Int[Any, "2"], most: Int[Any, "2"]
) -> Int[Array, "... 2"]:
  """Adds `size`, bytes and entries, up to `most`: the size of everything."""
  # The minimum comes first, because the full sum could overflow int32.
  size, most = (jnp.broadcast_to(x, missed.shape) for x in (size, most))
  return missed + jnp.minimum(size, most - missed)
