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
  """A way to send vectors, of three pure functions.

  `init` is called once per sender, with a vector of which only shape and type
  count, and returns a state without leaves if the compressor has no memory.
  `encode` runs at the sender and may be random. `decode` runs at the receiver
  and sees the payload and nothing else.

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
  """

  init: Callable[[Vector], State]
  encode: Callable[[Vector, State, PRNGKeyArray], tuple[Payload, State]]
  decode: Callable[[Payload], Vector]


class Transmission(NamedTuple):
  """What `transmit` returns: the vector that arrived, and how."""

  received: Vector
  state: State
  payload: Payload


@wire.message(tag=0)
class Dense:
  """A vector, entry by entry."""

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
    compressor: of the sender and the receiver.
    vector: what to send.
    state: the sender's, from `compressor.init` or the transmission before.
    key: for compressors that are random.

  Returns:
    What arrives, in the type of `vector`; the sender's new state; and the
    payload, whose `wire.nbytes` is what it took.
  """
  payload, state = compressor.encode(vector, state, key)
  received = compressor.decode(payload).astype(vector.dtype)
  return Transmission(received, state, payload)


def stateless(
  encode: Callable[[Vector, PRNGKeyArray], Payload],
  decode: Callable[[Payload], Vector],
) -> Compressor:
  """A compressor without memory, of `encode(vector, key)` and `decode`."""
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
  """Compresses the values that `first` sends by the compressors after it.

  A payload that can be compressed further has a field `values`, in whose place
  the next payload travels. `chain(top_k(1 / 16), stochastic_uniform(4))` sends
  a support
  and, of the values, codes and scales.

  Args:
    first: what sees the vector.
    *rest: what sees the values of the payload before.

  Returns:
    A `Compressor` whose payloads are nested.

  Raises:
    ValueError: from `init`, if a payload has no `values` to be compressed.
  """
  if not rest:
    return first
  then = chain(*rest)

  def init(vector):
    state = first.init(vector)
    key = jax.random.key(0)
    payload, _ = jax.eval_shape(first.encode, vector, state, key)
    if not hasattr(payload, "values"):
      raise ValueError(
        f"chain cannot compress a {type(payload).__name__} further: it has no"
        " `values`. Put the compressor that makes it last."
      )
    return state, then.init(payload.values)

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

  return Compressor(init, encode, decode)


def error_feedback(compressor: Compressor) -> Compressor:
  """Adds to every vector what `compressor` lost of the vectors before it.

  Seide et al. (2014), https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html.
  What was received and the residual then sum to all that was ever sent.

  Args:
    compressor: what sends the sum; better a contraction than unbiased.

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

  return Compressor(init, encode, compressor.decode)


def relative_to(
  reference: Float[Array, " n"], compressor: Compressor
) -> Compressor:
  """Sends how a vector differs from one that both ends know.

  Such as the factors that the experiment's seed draws: what never moves then
  costs nothing, and Top-K keeps what moved most.

  Args:
    reference: what both ends know.
    compressor: what sends the difference.
  """

  def encode(vector, state, key):
    return compressor.encode(vector - reference, state, key)

  def decode(payload):
    return reference + compressor.decode(payload)

  return Compressor(compressor.init, encode, decode)
