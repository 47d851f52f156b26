"""Tests of users' own payloads, in a module whose types are strings."""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import pca
from fedjax_llm.compression import payloads, wire

KEY = jax.random.key(0)


@wire.message(tag=101)
class Halves:
  """The first and the last entries of a vector, apart."""

  values: Any
  rest: jax.Array
  size: int

  def check(self) -> None:
    """Raises a ValueError if the halves are not those of the vector."""
    if self.values.size + self.rest.size != self.size:
      raise ValueError("The halves do not make the vector.")


def halves():
  def encode(vector, key):
    middle = vector.size // 2
    return Halves(vector[:middle], vector[middle:], vector.size)

  def decode(payload):
    return jnp.concatenate([payload.values, payload.rest])

  return compression.stateless(encode, decode)


def test_types_that_are_strings_tell_what_is_static():
  payload, _ = jax.jit(halves().encode)(jnp.arange(5.0), (), KEY)
  assert type(payload.size) is int
  assert len(jax.tree.leaves(payload)) == 2
  message = wire.dumps(payload)
  assert wire.nbytes(payload) == len(message)
  arrived = wire.loads(message)
  assert arrived.size == 5
  np.testing.assert_array_equal(halves().decode(arrived), np.arange(5.0))


def test_a_payload_of_ones_own_can_be_chained():
  compressor = compression.chain(halves(), compression.cast(jnp.bfloat16))
  vector = jnp.array([1 / 3, 0.5, 1 / 3, 0.25])
  state = compressor.init(vector)
  received, _, payload = compression.transmit(compressor, vector, state, KEY)
  assert wire.loads(wire.dumps(payload)).values.values.dtype == jnp.bfloat16
  assert received[0] != vector[0]
  np.testing.assert_array_equal(received[2:], vector[2:])


def test_a_message_is_checked_by_its_own_class():
  payload = Halves(np.zeros(2, np.float32), np.zeros(2, np.float32), 5)
  with pytest.raises(ValueError, match="do not make the vector"):
    wire.loads(wire.dumps(payload))


def test_a_field_with_a_keyword_comes_back():
  text = "from typing import Any\nclass Named:\n  values: Any\n"
  text += "  size: int = dataclasses.field(kw_only=True)\n"
  scope = {"__name__": __name__}
  exec("import dataclasses\n" + text, scope)
  cls = wire.message(tag=102)(scope["Named"])
  payload = cls(np.ones(2, np.float32), size=7)
  assert wire.loads(wire.dumps(payload)).size == 7


class Tuple(NamedTuple):
  values: Any
  size: int


@pytest.mark.parametrize("payload", [Tuple(jnp.ones(2), 2), (jnp.ones(2),)])
def test_a_tuple_is_no_payload(payload):
  sends_tuple = compression.stateless(
    lambda vector, key: payload, lambda payload: payload[0]
  )
  for complaint in (
    lambda: wire.nbytes(payload),
    lambda: wire.dumps(payload),
    lambda: compression.chain(sends_tuple, sends_tuple).init(jnp.ones(2)),
  ):
    with pytest.raises(ValueError, match=r"got a [Tt]uple.*message\(tag=64\)"):
      complaint()
  with pytest.raises(ValueError, match="Tuple is a tuple. Write"):
    wire.message(tag=103)(Tuple)


class Untyped:
  values = None
  size = 3


class Sizeless:
  values: Any


class Numbers:
  values: Any
  scale: float
  size: int


class Shapes:
  values: Any
  shape: tuple[int, ...]
  size: int


class Unknown:
  values: Elsewhere  # noqa: F821
  size: int


@pytest.mark.parametrize(
  ("cls", "complaint"),
  [
    (Untyped, "found no fields in Untyped"),
    (Sizeless, "expected Sizeless to have a `size`"),
    (Numbers, r"cannot send Numbers\.scale of type float"),
    (Shapes, r"cannot send Shapes\.shape of type tuple"),
    (Unknown, "field types of Unknown: name 'Elsewhere' is not defined"),
  ],
)
def test_a_class_that_cannot_be_sent_is_refused(cls, complaint):
  with pytest.raises(ValueError, match=complaint):
    wire.message(tag=104)(cls)
  assert 104 not in payloads.CLASSES


@pytest.mark.parametrize(
  "size, complaint",
  [
    (-1, "whole numbers of at least 0, got -1"),
    (2.5, "whole numbers of at least 0, got 2.5"),
    (np.ones(2), "Declare a field that holds an array as `Any`"),
    (2**31, "at most 2147483647 entries, .* got 2147483648"),
  ],
)
def test_a_static_field_is_a_whole_number(size, complaint):
  payload = Halves(np.ones(1, np.float32), np.ones(1, np.float32), size)
  with pytest.raises(ValueError, match=complaint):
    wire.nbytes(payload)


def test_an_array_has_no_more_entries_than_a_message_can_say():
  payload = compression.Dense(jax.ShapeDtypeStruct((2**31,), jnp.float32))
  with pytest.raises(ValueError, match="at most 2147483647 entries, .* got"):
    wire.nbytes(payload)


def new_class(name):
  return types.new_class(
    name,
    exec_body=lambda scope: scope.update(
      __module__=__name__, __annotations__={"size": int}
    ),
  )


def test_a_tag_stands_for_one_class():
  with pytest.raises(ValueError, match=r"tag=101 .*stands for .*\.Halves"):
    wire.message(tag=101)(new_class("Other"))
  # But a cell of a notebook may run again.
  wire.message(tag=105)(new_class("Cell"))
  again = wire.message(tag=105)(new_class("Cell"))
  assert type(wire.loads(wire.dumps(again(3)))) is again


@pytest.mark.parametrize("tag", [-1, 0, 63, 128])
def test_a_tag_that_is_not_a_users_is_refused(tag):
  with pytest.raises(ValueError, match=rf"in \[64, 128\) .*got {tag=}"):
    wire.message(tag=tag)(new_class("Another"))


def test_the_library_leaves_the_users_tags_alone():
  own = {
    tag: cls
    for tag, cls in payloads.CLASSES.items()
    if cls.__module__.startswith("fedjax_llm.")
    # Not that of a docstring.
    and getattr(sys.modules[cls.__module__], cls.__name__, None) is cls
  }
  assert {pca.Latent, compression.Dense} <= set(own.values())
  assert max(own) < 64
