"""Messages: the bytes of a payload.

A payload's arrays are already in wire format: codes and supports are packed.
So the length in bytes follows from the shapes, also under `jit`:
`nbytes(payload) == len(dumps(payload))`.

A message is `FJ`, a version byte and one node. A node is either a tag (below
128) and the fields of the tag's class in order, or 128 + the code of a data
type, a length and the raw little-endian array. Integers are varints: seven bits
per byte, low bits first, with the top bit set in all bytes but the last.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedjax_llm.compression import payloads

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
# No chain is this long. Bounds the recursion that hostile bytes can cause.
_DEPTH = 16

message = payloads.message


def nbytes(payload: Any) -> int:
  """The length of the message in bytes, header included.

  Args:
    payload: a payload of arrays, tracers or `jax.ShapeDtypeStruct`s.

  Returns:
    `len(dumps(payload))`, a Python integer without an upper bound.

  Raises:
    ValueError: if the payload cannot be sent.
  """
  return sum(
    len(part) if isinstance(part, bytes) else part.size * part.dtype.itemsize
    for part in _parts(payload)
  )


def entries(payload: Any) -> int:
  """Returns the number of values that are sent: k for a Top-K, in any type."""
  while hasattr(payload, "values"):
    payload = payload.values
  return getattr(payload, "numbers", payload.size)


def dumps(payload: Any) -> bytes:
  """Serialises a payload to a message.

  Args:
    payload: a payload of concrete arrays.

  Returns:
    Bytes that `loads` can read.

  Raises:
    ValueError: if a value is not finite, or the payload cannot be sent.
  """
  return b"".join(
    part
    if isinstance(part, bytes)
    else _require_finite(np.asarray(part)).tobytes()
    for part in _parts(payload)
  )


def loads(data: bytes) -> Any:
  """Reads a payload from a message; its arrays are NumPy arrays.

  `loads` allocates nothing that is larger than `data`. Decoding may: a support
  of a few bytes can name one entry of a very long vector. Compare the payload's
  `size` with the size you expect before you decode a stranger's message.

  Args:
    data: a message from `dumps`.

  Returns:
    A payload for which `dumps` returns `data` again.

  Raises:
    ValueError: if `data` is not a message that `dumps` can return.
  """
  magic, rest = _take(memoryview(data), len(_MAGIC) + 1)
  if bytes(magic[:-1]) != _MAGIC:
    raise ValueError(
      f"A message begins with {_MAGIC!r}, got {bytes(magic[:-1])!r}."
    )
  if magic[-1] != _VERSION:
    raise ValueError(
      f"The message has version {magic[-1]}, but this release reads version"
      f" {_VERSION}. Install the same release at both ends."
    )
  payload, rest = _read_node(rest, _DEPTH)
  if rest:
    raise ValueError(f"{len(rest)} bytes follow the end of the message.")
  return payload


def require(array: Any, dtype: Any, size: int, name: str) -> None:
  """Raises a ValueError unless `array` has `size` entries of `dtype`."""
  expected = f"{np.dtype(dtype)}[{size}]"
  is_array = isinstance(array, np.ndarray)
  got = f"{array.dtype}[{array.size}]" if is_array else type(array).__name__
  if got != expected:
    raise ValueError(f"The message's {name} should be {expected}, got {got}.")


def _parts(payload: Any) -> Iterator[Any]:
  """Yields the parts of a message in order: bytes, and unchanged arrays."""
  yield _MAGIC + bytes([_VERSION])
  yield from _node_parts(payload)


def _node_parts(node: Any) -> Iterator[Any]:
  if type(node) in payloads.FORMATS:
    tag, fields = payloads.FORMATS[type(node)]
    yield bytes([tag])
    for name, is_static in fields.items():
      value = getattr(node, name)
      yield from [_varint(value)] if is_static else _node_parts(value)
    return
  if not (hasattr(node, "shape") and hasattr(node, "dtype")):
    raise ValueError(
      "A payload is an array, or an object of a class that `message` made; got"
      f" a {type(node).__name__}. Declare a class of its own:"
      f" @fl.message(tag={payloads.USER_TAGS.start})."
    )
  if len(node.shape) != 1 or node.dtype not in _DTYPES:
    raise ValueError(
      "A payload's arrays have one dimension and a type among"
      f" {', '.join(map(str, _DTYPES))}; got {node.dtype}{list(node.shape)}."
      " If vmap made this payload, take one client's entry of each array."
    )
  yield bytes([_ARRAY + _DTYPES.index(node.dtype)]) + _varint(node.size)
  yield node


def _read_node(data: memoryview, depth: int) -> tuple[Any, memoryview]:
  (kind,), data = _take(data, 1)
  if kind >= _ARRAY:
    return _read_array(kind - _ARRAY, data)
  if kind not in payloads.CLASSES:
    raise ValueError(f"The message has unknown tag {kind}.")
  if not depth:
    raise ValueError("The message is too deep.")
  cls, values = payloads.CLASSES[kind], {}
  for name, is_static in payloads.FORMATS[cls].fields.items():
    if is_static:
      values[name], data = _read_varint(data)
    else:
      values[name], data = _read_node(data, depth - 1)
  payload = cls(**values)
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
      f"The message is cut short: expected {size} more bytes, got {len(data)}."
    )
  return data[:size], data[size:]


def _varint(value: Any) -> bytes:
  if not isinstance(value, int | np.integer) or value < 0:
    raise ValueError(
      "A payload's `int` fields are whole numbers of at least 0, got"
      f" {value!r}. Declare a field that holds an array as `Any`."
    )
  if value > _LIMIT:
    raise ValueError(
      f"A message holds arrays of at most {_LIMIT} entries, and no larger"
      f" numbers, got {value}. Send fewer entries, such as LoRA factors."
    )
  digits = [int(value)]
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
      f"{bad} of {array.size} values are not finite, and are not sent. Either"
      " the vector has diverged, or its values are too large for the type they"
      " travel in."
    )
  return array
