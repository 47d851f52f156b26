"""Compressors: how a flat vector becomes a message and a vector again."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from fedjax_llm.compression import wire

Vector = Float[Array, " n"]
State = Any
Payload = Any


class Compressor(NamedTuple):
  """Three pure functions that send vectors.

  >>> import jax, jax.numpy as jnp
  >>> from fedjax_llm import compression
  >>> from fedjax_llm.compression import wire
  >>> compressor = compression.error_feedback(compression.top_k(0.5))
  >>> vector = jnp.array([4.0, -1.0, 0.0, 3.0])
  >>> state = compressor.init(vector)
  >>> payload, state = compressor.encode(vector, state, jax.random.key(0))
  >>> print(compressor.decode(payload))
  [4. 0. 0. 3.]
  >>> residual, _ = state
  >>> print(residual)
  [ 0. -1.  0.  0.]
  >>> wire.nbytes(payload)
  18

  Attributes:
    init: vector -> state. Called once for each sender. Depends only on the
      vector's shape and type. Without memory, the state has no leaves.
    encode: (vector, state, key) -> (payload, state). Runs at the sender, and
      may be random.
    decode: payload -> vector. Runs at the receiver, which knows the payload and
      nothing else.
    for_updates: whether the compressor adds what one message loses to a later
      message. This suits updates, which are added up, but not parameters.
  """

  init: Callable[[Vector], State]
  encode: Callable[[Vector, State, PRNGKeyArray], tuple[Payload, State]]
  decode: Callable[[Payload], Vector]
  for_updates: bool = False


class Transmission(NamedTuple):
  """The result of `transmit`.

  Attributes:
    received: the vector that arrives.
    state: the sender's new state.
    payload: the message; its length is `wire.nbytes(payload)` bytes.
  """

  received: Vector
  state: State
  payload: Payload


@wire.message(tag=0)
class Dense:
  """A vector, entry by entry. A position means the same in every message."""

  values: Any

  @property
  def size(self) -> int:
    """The number of entries."""
    return self.values.size


def transmit(
  compressor: Compressor,
  vector: Float[Array, " n"],
  state: State,
  key: PRNGKeyArray,
) -> Transmission:
  """Sends `vector` through `compressor`.

  Args:
    compressor: the compressor of both ends.
    vector: the vector to send.
    state: the sender's state, from `compressor.init` or the last transmission.
    key: the random key for `encode`.

  Returns:
    The vector that arrives, in the type of `vector`; the sender's new state;
    and the payload.

  Raises:
    ValueError: if `decode` returns a vector of another length.
  """
  payload, state = compressor.encode(vector, state, key)
  received = compressor.decode(payload)
  if received.shape != vector.shape:
    raise ValueError(
      f"expected decode to return a vector of {vector.size} entries, the length"
      f" of the encoded vector, got shape {received.shape} from a"
      f" {type(payload).__name__}."
    )
  return Transmission(received.astype(vector.dtype), state, payload)


def require_size(name: str, vector: Vector, size: int, hint: str) -> None:
  """Raises a ValueError unless `vector` has `size` entries.

  Args:
    name: the name of the function or object that expects the vector.
    vector: the vector.
    size: the expected number of entries.
    hint: the last sentence of the message.
  """
  if vector.shape != (size,):
    raise ValueError(
      f"{name} expected a vector of {size} entries, got {vector.shape}. {hint}"
    )


def stateless(
  encode: Callable[[Vector, PRNGKeyArray], Payload],
  decode: Callable[[Payload], Vector],
) -> Compressor:
  """A compressor without memory.

  A payload of your own is a class with a tag in [64, 127]. This compressor
  sends every other entry. Others can follow it in a `chain`, because its
  payload has `values`:

  >>> from typing import Any
  >>> import jax.numpy as jnp
  >>> from fedjax_llm.compression import base, levels, wire
  >>> @wire.message(tag=127)
  ... class EveryOther:
  ...   values: Any
  ...   size: int
  >>> def every_other():
  ...   def encode(vector, key):
  ...     return EveryOther(vector[::2], vector.size)
  ...   def decode(payload):
  ...     return jnp.zeros(payload.size).at[::2].set(payload.values)
  ...   return base.stateless(encode, decode)
  >>> payload, _ = every_other().encode(jnp.arange(5.0), (), None)
  >>> print(every_other().decode(payload))
  [0. 0. 2. 0. 4.]
  >>> wire.nbytes(payload) == len(wire.dumps(payload))
  True
  >>> short = base.error_feedback(base.chain(every_other(), levels.sign()))

  Args:
    encode: (vector, key) -> payload.
    decode: payload -> vector.

  Returns:
    A `Compressor` whose state is ().
  """
  return Compressor(
    init=lambda vector: (),
    encode=lambda vector, state, key: (encode(vector, key), state),
    decode=decode,
  )


def identity() -> Compressor:
  """Sends the vector as it is."""
  return stateless(
    encode=lambda vector, key: Dense(vector),
    decode=lambda payload: jnp.asarray(payload.values),
  )


def chain(first: Compressor, *rest: Compressor) -> Compressor:
  """Compresses a vector with `first`, and its payload's values with `rest`.

  A payload that can be compressed further has a field `values`. The next
  compressor's payload replaces this field. `chain(top_k(1 / 16),
  stochastic_uniform(4))` sends a support, and codes and scales for the values.

  Args:
    first: the compressor of the vector.
    *rest: the compressors that follow; each compresses the `values` of the
      payload before it.

  Returns:
    A `Compressor` whose payloads are nested.

  Raises:
    ValueError: from `init`, if a payload has no `values`, or if a compressor in
      `rest` has a memory but the positions of its values change between
      messages.
  """
  if not rest:
    return first
  then = chain(*rest)

  def init(vector):
    state = first.init(vector)
    key = jax.random.key(0)
    payload, _ = jax.eval_shape(first.encode, vector, state, key)
    _require_values(payload)
    then_state = then.init(payload.values)
    # Positions keep their meaning only in a `Dense`.
    if jax.tree.leaves(then_state) and type(payload) is not Dense:
      raise ValueError(
        "chain expected compressors without memory after a"
        f" {type(payload).__name__}: they would remember by position, and the"
        " positions of its values change from message to message. Put the"
        " memory around the chain: error_feedback(chain(...))."
      )
    return state, then_state

  def encode(vector, state, key):
    first_state, then_state = state
    first_key, then_key = jax.random.split(key)
    payload, first_state = first.encode(vector, first_state, first_key)
    values, then_state = then.encode(payload.values, then_state, then_key)
    payload = dataclasses.replace(payload, values=values)
    return payload, (first_state, then_state)

  def decode(payload):
    values = then.decode(payload.values)
    return first.decode(dataclasses.replace(payload, values=values))

  return Compressor(init, encode, decode, first.for_updates or then.for_updates)


def _require_values(payload: Payload) -> None:
  wire.nbytes(payload)  # Raises if the payload cannot be sent.
  name = type(payload).__name__
  if not hasattr(payload, "values"):
    raise ValueError(
      f"chain cannot compress a {name} further: it has no `values`. Put the"
      " compressor that makes it last."
    )
  if not hasattr(payload.values, "dtype"):
    raise ValueError(
      f"chain cannot compress a {name} of a {type(payload.values).__name__}"
      " further: its first compressor is itself a chain. List all compressors"
      " in one chain."
    )


def error_feedback(compressor: Compressor) -> Compressor:
  """Adds to each vector what `compressor` lost from earlier vectors.

  Seide et al. (2014), https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html.
  The residual is the sum of all sent vectors minus all that has arrived. Use it
  for updates, not for downloads of parameters.

  Args:
    compressor: the compressor of vector plus residual. A contraction, such as
      `top_k`, is better than an unbiased one.

  Returns:
    A `Compressor` with state (residual, state of `compressor`).
  """

  def init(vector):
    residual = jnp.zeros(vector.shape, vector.dtype)
    return residual, compressor.init(vector)

  def encode(vector, state, key):
    residual, inner = state
    target = vector + residual
    received, inner, payload = transmit(compressor, target, inner, key)
    return payload, (target - received, inner)

  return Compressor(init, encode, compressor.decode, for_updates=True)


def relative_to(
  reference: Float[Array, " n"], compressor: Compressor
) -> Compressor:
  """Sends the difference between a vector and one that both ends know.

  The reference may be the initial parameters, which both ends draw from the
  experiment's seed. Top-K then keeps the entries that moved most, and spends
  nothing on entries that never moved.

  Args:
    reference: the vector that both ends know.
    compressor: the compressor of the difference.
  """
  return compressor._replace(
    encode=lambda vector, state, key: compressor.encode(
      vector - reference, state, key
    ),
    decode=lambda payload: reference + compressor.decode(payload),
  )
