"""Channels: how both directions of a round are compressed, for each tier.

Clients of all tiers train in one shape, so that they run as one program; only
their messages differ, and a message's size is static. So every tier's message
is written, and each client takes its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.compression import base, wire


class Channel(NamedTuple):
  """How both directions are compressed, and what is trained in between.

  Attributes:
    download: of the trainable parameters.
    upload: of a client's update; or a function that makes the compressor from
      the payload that the client received, because what both ends know after
      the download needs no bytes.
    trains: which entries a client trains, made from the payload it received,
      as by `sparse.support`; None for all of them.
  """

  download: base.Compressor = base.identity()
  upload: base.Compressor | Callable[[Any], base.Compressor] = base.identity()
  trains: Callable[[Any], Any] | None = None

  def uplink(self, payload: Any) -> base.Compressor:
    """The upload compressor of a client that received `payload`."""
    if isinstance(self.upload, base.Compressor):
      return self.upload
    return self.upload(payload)


class Tiers(NamedTuple):
  """Clients of different capability: they train alike, their messages differ.

  Attributes:
    channels: of each tier.
    of_client: numbers of clients -> numbers of their tiers.
  """

  channels: Sequence[Channel]
  of_client: Callable[[Any], Any]


class Message(NamedTuple):
  """One client's answer as it arrives, and what sending it took.

  Attributes:
    received: the decoded vector.
    memory: the sender's states, of every tier.
    nbytes: int32, the length of the payload.
    entries: int32, how many numbers it carries.
  """

  received: Any
  memory: Any
  nbytes: Any
  entries: Any


def tiers_of(channel: Channel | Tiers | None) -> Tiers:
  """The tiers; one that everybody is of, if there is one channel."""
  if isinstance(channel, Tiers):
    if not channel.channels:
      raise ValueError("Tiers expected at least one channel, got none.")
    return Tiers(tuple(channel.channels), channel.of_client)
  return Tiers((channel or Channel(),), jnp.zeros_like)


def trains(tiers: Tiers, payloads: Sequence[Any]) -> Any:
  """What clients train: a mask for each tier, or None if that is everything."""
  if all(channel.trains is None for channel in tiers.channels):
    return None
  return tuple(
    jnp.ones(payload.size, bool) if x.trains is None else x.trains(payload)
    for x, payload in zip(tiers.channels, payloads, strict=True)
  )


def upload(
  tiers: Tiers,
  payloads: Sequence[Any],
  tier: Any,
  update: Any,
  memory: Any,
  key: Any,
) -> Message:
  """Sends a client's update as its tier does."""

  def branch(number, channel, payload):
    def fn(update, memory, key):
      message = base.transmit(
        channel.uplink(payload), update, memory[number], key
      )
      states = (*memory[:number], message.state, *memory[number + 1 :])
      return Message(
        message.received,
        states,
        jnp.int32(wire.nbytes(message.payload)),
        jnp.int32(wire.entries(message.payload)),
      )

    return fn

  branches = [
    branch(i, *x)
    for i, x in enumerate(zip(tiers.channels, payloads, strict=True))
  ]
  if len(branches) == 1:
    return branches[0](update, memory, key)
  return jax.lax.switch(tier, branches, update, memory, key)


def upload_states(channel: Channel, vector: Any, population: int | None) -> Any:
  """The state of the upload compressor for each client: [population, ...]."""

  def first(vector):
    state = channel.download.init(vector)
    key = jax.random.key(0)
    payload, _ = channel.download.encode(vector, state, key)
    return channel.uplink(payload).init(vector)

  # Traced first, so that what the round would refuse is refused here.
  shapes = jax.eval_shape(first, vector)
  if not jax.tree.leaves(shapes):
    return shapes
  if population is None:
    raise ValueError(
      "federated_round needs `population`, the number of clients, because"
      " the upload compressor keeps a state for each."
    )
  copies = lambda x: jnp.broadcast_to(x, (population, *x.shape))
  return jax.tree.map(copies, jax.jit(first)(vector))
