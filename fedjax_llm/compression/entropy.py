"""What a message would take if its length could depend on its data.

The length of a message is static, as `jit` asks for. Papers code further: STC
the gaps between positions by Golomb (1966), QSGD the levels, of which most are
zero. On the host, of a real payload, `nbytes` measures what that leaves, for a
metric of its own; nothing here travels.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from fedjax_llm.compression import (
  levels,
  packing,
  quantize,
  sparse,
  supports,
  wire,
)


def nbytes(payload: Any) -> int:
  """The length of the message with its parts in entropy codes.

  Supports of a Top-K in Golomb codes, codes of quantisers in an adaptive
  arithmetic code; all else, and what would not become shorter, as it is.

  Args:
    payload: of concrete arrays.

  Returns:
    Bytes, header included; at most `wire.nbytes(payload)`.
  """
  return wire.nbytes(_coded(payload))


def golomb_parameter(density: float) -> int:
  """The bits b of a gap's remainder that suit positions of a density best.

  Sattler et al., the STC paper, 2019 (arXiv 1903.02891).

  Args:
    density: in (0, 1).
  """
  golden = (math.sqrt(5) - 1) / 2
  ratio = math.log(golden) / math.log1p(-density)
  return max(0, 1 + math.floor(math.log2(ratio)))


def golomb_bits(density: float, parameter: int) -> float:
  """The expected bits of a position: of its remainder, and its quotient."""
  return parameter + 1 / (1 - (1 - density) ** 2**parameter)


def golomb_pack(indices: Int[np.ndarray, " count"], size: int) -> bytes:
  """Packs the indices, sorted and each once, of entries of a vector.

  Of each gap the quotient by 2**b in unary, ones before a zero, and b bits of
  the remainder, low ones first.

  Args:
    indices: at least one, in increasing order.
    size: the length of the vector.

  Returns:
    So many bytes as these need; none if all entries are there.
  """
  count = len(indices)
  if count == size:
    return b""
  parameter = golomb_parameter(count / size)
  gaps = np.diff(indices, prepend=-1) - 1
  ends = np.cumsum((gaps >> parameter) + 1 + parameter)
  stream = np.ones(ends[-1], np.uint8)
  stream[ends - parameter - 1] = 0
  for place in range(parameter):
    stream[ends - parameter + place] = gaps >> place & 1
  return np.packbits(stream, bitorder="little").tobytes()


def golomb_unpack(data: bytes, size: int, count: int) -> np.ndarray:
  """The indices, int64 [count], that `golomb_pack` packed."""
  if count == size:
    return np.arange(size)
  parameter = golomb_parameter(count / size)
  stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
  zeros = np.flatnonzero(stream == 0)
  gaps, start = np.zeros(count, np.int64), 0
  for i in range(count):
    zero = zeros[np.searchsorted(zeros, start)]
    remainder = stream[zero + 1 : zero + 1 + parameter]
    gaps[i] = (zero - start << parameter) + remainder @ (
      1 << np.arange(parameter)
    )
    start = zero + 1 + parameter
  return np.cumsum(gaps + 1) - 1


def adaptive_bits(codes: Int[np.ndarray, " n"], count: int) -> float:
  """The bits of codes in an arithmetic code that learns how frequent each is.

  A code's chance is how often it came so far, plus one, over all that came,
  plus `count`. The order does not matter in the end; no table is sent.

  Args:
    codes: in [0, count).
    count: of different codes.
  """
  from scipy import special

  seen = np.bincount(codes, minlength=count)
  total = special.gammaln(seen.sum() + count) - special.gammaln(count)
  return float(total - special.gammaln(seen + 1).sum()) / math.log(2)


def _coded(node: Any) -> Any:
  """The payload, with lengths in the place of the parts that are coded."""
  parts: dict[str, Any] = {}
  if isinstance(node, sparse.Sparse):
    parts["support"] = _shorter(node.support, _support_nbytes(node))
  if type(node) in _CODES:
    codes, count = _CODES[type(node)](node)
    # What ends an arithmetic code takes two bits at most.
    bits = 2 + adaptive_bits(np.asarray(codes), count)
    parts["codes"] = _shorter(node.codes, math.ceil(bits / 8))
  if hasattr(node, "values"):
    parts["values"] = _coded(node.values)
  return dataclasses.replace(node, **parts) if parts else node


# How each payload that has codes unpacks them, and how many codes there are.
_CODES = {
  levels.Levels: lambda x: (
    packing.unpack_digits(x.codes, x.size, x.levels),
    x.levels,
  ),
  quantize.Nearest: lambda x: (
    packing.unpack_bits(x.codes, x.size, x.bits),
    2**x.bits,
  ),
  quantize.Powers: lambda x: (packing.unpack_bits(x.codes, x.size, 9), 2**9),
}


def _support_nbytes(node: sparse.Sparse) -> int:
  indices = supports.unpack(node.support, node.size, node.values.size)
  return len(golomb_pack(np.asarray(indices), node.size))


def _shorter(packed: Any, length: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((min(packed.size, length),), np.uint8)
