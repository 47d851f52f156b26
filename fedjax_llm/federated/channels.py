"""Channels: how both directions of a round are compressed, for each tier.

Clients of all tiers train arrays of the same shape, so one program runs them
all. Only their messages differ. The size of a message is static, so each tier
is a branch of the program; vmapped clients compute all branches.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import clients

# A round counts bytes in int32.
_MOST_BYTES = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Channel:
  """How both directions are compressed, and what is trained in between.

  Attributes:
    download: the compressor of the trainable parameters.
    upload: the compressor of a client's update; or a function that makes it
      from the payload that the client received. Both ends know this payload, so
      nothing in it has to be sent again.
    trains: a function from the payload that a client received to a mask of the
      entries that it trains, such as `sparse.support`; None for all entries.

  Raises:
    ValueError: if the download is for updates, such as `error_feedback`, or if
      `download` or `upload` has a wrong type.
  """

  download: base.Compressor = base.identity()
  upload: base.Compressor | Callable[[Any], base.Compressor] = base.identity()
  trains: Callable[[Any], Any] | None = None

  def __post_init__(self):
    """Refuses wrong types, and downloads that add old losses to parameters."""
    if not isinstance(self.download, base.Compressor):
      raise ValueError(
        "Channel expected a Compressor as download, such as top_k(1 / 4), got"
        f" {self.download!r}."
      )
    if not callable(self.upload) and not isinstance(
      self.upload, base.Compressor
    ):
      raise ValueError(
        "Channel expected a Compressor as upload, such as top_k(1 / 16), or a"
        f" function from the download's payload to one, got {self.upload!r}."
      )
    if self.download.for_updates:
      raise ValueError(
        "Channel expected a download for parameters, got one for updates, such"
        " as error_feedback: what it lost in one round would be added to the"
        " parameters of the next. To send what changed since a client's last"
        " download, use fl.algorithms.delta_downloads."
      )

  def uplink(self, payload: Any) -> base.Compressor:
    """Returns the upload compressor of a client that received `payload`."""
    if isinstance(self.upload, base.Compressor):
      return self.upload
    return self.upload(payload)


class Tiers(NamedTuple):
  """Clients of different capability. They train alike; their messages differ.

  Attributes:
    channels: the channel of each tier.
    of_client: a function from client numbers to tier numbers; if not given,
      client i is in tier i modulo tiers.
  """

  channels: Sequence[Channel]
  of_client: Callable[[Any], Any] | None = None

  def tier_of(self, client: Any) -> Any:
    """Returns the tier number of a client, or of each client of an array."""
    of_client = self.of_client or clients.in_turn(len(self.channels))
    return of_client(client)


class Message(NamedTuple):
  """One client's answer as it arrives, and the size of its message.

  Attributes:
    received: the decoded vector.
    memory: what the sender remembers; usually its compressors' states, one for
      each tier.
    nbytes: int32, the length of the message.
    entries: int32, the number of values that it carries.
  """

  received: Any
  memory: Any
  nbytes: Any
  entries: Any


def sizes(*payloads: Any, setup_bytes: int = 0) -> np.ndarray:
  """Returns the bytes and values of payloads sent together: int32 [2].

  Args:
    *payloads: the payloads.
    setup_bytes: additional bytes that are sent, such as those of an encoder.

  Raises:
    ValueError: if there are 2**31 bytes or more, which a round cannot count.
  """
  nbytes = setup_bytes + sum(map(wire.nbytes, payloads))
  if nbytes > _MOST_BYTES:
    raise ValueError(
      f"expected messages below 2 GiB, got one of {nbytes} bytes in one round."
      " Train fewer parameters, such as LoRA factors, or compress the messages:"
      " Channel(top_k(1 / 4), top_k(1 / 16))."
    )
  return np.array([nbytes, sum(map(wire.entries, payloads))], np.int32)


def tiers_of(channel: Channel | Tiers | None) -> Tiers:
  """Returns the tiers; a channel becomes a single tier for all clients."""
  tiers = (
    channel if isinstance(channel, Tiers) else Tiers([channel or Channel()])
  )
  if not tiers.channels:
    raise ValueError("Tiers expected at least one channel, got none.")
  return tiers


def trains(tiers: Tiers, payloads: Sequence[Any]) -> Any:
  """Returns the mask of trained entries for each tier; None to train all."""
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
  """Sends a client's update through the channel of its tier.

  Args:
    tiers: all tiers.
    payloads: what each tier received.
    tier: the client's tier, traced.
    update: the client's update.
    memory: the client's states, one for each tier.
    key: the random key of the upload.
  """

  def send(number, update, memory, key):
    compressor = tiers.channels[number].uplink(payloads[number])
    message = base.transmit(compressor, update, memory[number], key)
    states = (*memory[:number], message.state, *memory[number + 1 :])
    return Message(message.received, states, *sizes(message.payload))

  branches = [functools.partial(send, i) for i in range(len(tiers.channels))]
  return jax.lax.switch(tier, branches, update, memory, key)


def upload_states(channel: Channel, vector: Any, population: int | None) -> Any:
  """Returns the upload compressor's first states: [population, ...].

  Raises:
    ValueError: if there are states and `population` is missing, or if a message
      of this channel has 2 GiB or more.
  """
  key = jax.random.key(0)

  def start(vector):
    state = channel.download.init(vector)
    payload, _ = channel.download.encode(vector, state, key)
    compressor = channel.uplink(payload)
    state = compressor.init(vector)
    return state, (payload, compressor.encode(vector, state, key)[0])

  # Traced first, to raise here the errors that the round would raise.
  shapes, payloads = jax.eval_shape(start, vector)
  for payload in payloads:
    sizes(payload)
  if not jax.tree.leaves(shapes):
    return shapes
  if population is None:
    raise ValueError(
      "expected population=, the number of clients: the upload compressor keeps"
      " a state for each client."
    )
  return clients.copies(jax.jit(lambda x: start(x)[0])(vector), population)
