"""Messages: what a payload is, and its bytes.

A payload is a frozen pytree dataclass whose arrays are already in wire format
(codes and supports packed), so its length in bytes is known from its shapes:
`nbytes(payload) == len(dumps(payload))`, under `jit` as well.

A message is `FJ`, a version, and one node. A node is either a tag (below 128)
and the fields of that class in order, or 128 + a data type, a length and the
raw little-endian array. Integers are varints: seven bits a byte, low ones
first, the top bit set on all bytes but the last.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

_MAGIC = b"FJ"
_VERSION = 1
_ARRAY = 128
# The position is the code on the wire: append only.
_DTYPES = tuple(
  np.dtype(dtype)
  for dtype in (
    *(jnp.bfloat16, np.float16, np.float32, np.float64),
    *(np.uint8, np.uint16, np.uint32, np.int8, np.int16, np.int32),
  )
)
# Indices are int32, so no vector and no array is longer than this.
_LIMIT = 2**31 - 1
# No chain is this long; bounds the recursion that hostile bytes can cause.
_DEPTH = 16

_CLASSES: dict[int, type] = {}
_TAGS: dict[type, int] = {}


@dataclass_transform(frozen_default=True, eq_default=False)
def message(*, tag: int) -> Callable[[type], type]:
  """Makes a class a payload: a frozen pytree dataclass that can be sent.

  Fields annotated `int` are static; all others are data, arrays of one
  dimension or further payloads, and are declared `Any`. As an array does, a
  payload has a `size`: how many entries it decodes to. It may have a method
  `check`, by which `loads` refuses fields that do not fit each other.

  Args:
    tag: what stands for the class in a message, in [0, 128) and never reused.

  Returns:
    The class decorator.

  Raises:
    ValueError: if `tag` is out of range or belongs to another class.
  """
  if not 0 <= tag < _ARRAY:
    raise ValueError(f"message expected a tag in [0, {_ARRAY}), got {tag=}.")

  def register(cls: type) -> type:
    taken = _CLASSES.get(tag)
    if taken and taken.__qualname__ != cls.__qualname__:
      raise ValueError(f"{tag=} already stands for {taken.__qualname__}.")
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    jax.tree_util.register_dataclass(
      cls,
      data_fields=[field.name for field in fields if field.type is not int],
      meta_fields=[field.name for field in fields if field.type is int],
    )
    _CLASSES[tag], _TAGS[cls] = cls, tag
    return cls

  return register


def nbytes(payload: Any) -> int:
  """The length of the message in bytes, header included.

  Args:
    payload: of arrays, tracers or `jax.ShapeDtypeStruct`s.

  Returns:
    `len(dumps(payload))`, a Python integer.
  """
  return sum(
    len(part) if isinstance(part, bytes) else part.size * part.dtype.itemsize
    for part in _parts(payload)
  )


def entries(payload: Any) -> int:
  """How many numbers travel in a payload, whatever they take: k of a Top-K."""
  while hasattr(payload, "values"):
    payload = payload.values
  return getattr(payload, "numbers", payload.size)


def dumps(payload: Any) -> bytes:
  """The message that carries `payload`.

  Args:
    payload: of concrete arrays.

  Returns:
    Bytes that `loads` understands.

  Raises:
    ValueError: if a value is not finite, or an array cannot be sent.
  """
  return b"".join(
    part
    if isinstance(part, bytes)
    else _require_finite(np.asarray(part)).tobytes()
    for part in _parts(payload)
  )


def loads(data: bytes) -> Any:
  """The payload that a message carries, of NumPy arrays.

  Nothing is allocated that is larger than `data`. Decoding may be: a support of
  a few bytes can name one entry of a very long vector, so compare the payload's
  `size` with the one you expect before you decode what a stranger sent.

  Args:
    data: what `dumps` returned.

  Returns:
    A payload whose `dumps` is `data` again.

  Raises:
    ValueError: if `data` is anything that `dumps` does not return.
  """
  magic, rest = _take(memoryview(data), len(_MAGIC) + 1)
  if bytes(magic[:-1]) != _MAGIC:
    raise ValueError(
      f"A message begins with {_MAGIC!r}, got {bytes(magic[:-1])!r}."
    )
  if magic[-1] != _VERSION:
    raise ValueError(
      f"The message has version {magic[-1]}, but this release reads version"
      f" {_VERSION}. Install the release that both ends have in common."
    )
  payload, rest = _read_node(rest, _DEPTH)
  if rest:
    raise ValueError(f"{len(rest)} bytes follow the end of the message.")
  return payload


def require(array: Any, dtype: Any, size: int, name: str) -> None:
  """Raises a ValueError unless `array` is one of `size` entries of `dtype`."""
  expected = f"{np.dtype(dtype)}[{size}]"
  is_array = isinstance(array, np.ndarray)
  got = f"{array.dtype}[{array.size}]" if is_array else type(array).__name__
  if got != expected:
    raise ValueError(f"The message's {name} should be {expected}, got {got}.")


def _parts(payload: Any) -> Iterator[Any]:
  """Yields the message in order: bytes, and the arrays as they are."""
  yield _MAGIC + bytes([_VERSION])
  yield from _node_parts(payload)


def _node_parts(node: Any) -> Iterator[Any]:
  if type(node) in _TAGS:
    yield bytes([_TAGS[type(node)]])
    for field in dataclasses.fields(node):
      value = getattr(node, field.name)
      if field.type is int:
        yield _varint(value)
      else:
        yield from _node_parts(value)
    return
  if len(node.shape) != 1 or node.dtype not in _DTYPES:
    raise ValueError(
      "A payload's arrays have one dimension and a type among"
      f" {', '.join(map(str, _DTYPES))}; got {node.dtype}{list(node.shape)}."
      " If vmap made this payload, index one client's out of it."
    )
  yield bytes([_ARRAY + _DTYPES.index(node.dtype)]) + _varint(node.size)
  yield node


def _read_node(data: memoryview, depth: int) -> tuple[Any, memoryview]:
  (kind,), data = _take(data, 1)
  if kind >= _ARRAY:
    return _read_array(kind - _ARRAY, data)
  if kind not in _CLASSES or not depth:
    problem = "is too deep" if kind in _CLASSES else f"has unknown tag {kind}"
    raise ValueError(f"The message {problem}.")
  cls, values = _CLASSES[kind], []
  for field in dataclasses.fields(cls):
    if field.type is int:
      value, data = _read_varint(data)
    else:
      value, data = _read_node(data, depth - 1)
    values.append(value)
  payload = cls(*values)
  if hasattr(payload, "check"):
    payload.check()
  return payload, data


def _read_array(code: int, data: memoryview) -> tuple[np.ndarray, memoryview]:
  if code >= len(_DTYPES):
    raise ValueError(f"The message has an array of unknown type {code}.")
  size, data = _read_varint(data)
  raw, data = _take(data, size * _DTYPES[code].itemsize)
  return _require_finite(np.frombuffer(raw, _DTYPES[code])), data


def _take(data: memoryview, size: int) -> tuple[memoryview, memoryview]:
  if size > len(data):
    raise ValueError(
      f"The message is cut short: it should have {size} more bytes, it has"
      f" {len(data)}."
    )
  return data[:size], data[size:]


def _varint(value: int) -> bytes:
  digits = [value]
  while digits[-1] > 127:
    digits[-1:] = [digits[-1] & 127 | 128, digits[-1] >> 7]
  return bytes(digits)


def _read_varint(data: memoryview) -> tuple[int, memoryview]:
  value = 0
  for place in range(math.ceil(_LIMIT.bit_length() / 7)):
    (digit,), data = _take(data, 1)
    value |= (digit & 127) << 7 * place
    if digit < 128:
      is_shortest = digit > 0 or place == 0
      if is_shortest and value <= _LIMIT:
        return value, data
      break
  raise ValueError(f"The message has a number that is not in [0, {_LIMIT}].")


def _require_finite(array: np.ndarray) -> np.ndarray:
  bad = array.size - np.count_nonzero(np.isfinite(array))
  if bad:
    raise ValueError(
      f"{bad} of {array.size} values are not finite, and are not sent: the"
      " vector has diverged, or is too large for the type it travels in."
    )
  return array
