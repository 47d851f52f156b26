"""The length that a message would have if it could depend on its data.

Under `jit` the length of a message is static. Some papers code further: STC
codes the gaps between positions (Golomb, 1966), and QSGD codes the levels, most
of which are zero. `nbytes` measures on the host how short a real payload would
become. It is for a metric of its own; nothing here travels.
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
  """The length of the message with entropy-coded parts.

  Supports of a Top-K are coded by Golomb's code, and codes of quantisers by an
  adaptive arithmetic code. A part that would not become shorter stays as it is.

  Args:
    payload: a payload of concrete arrays.

  Returns:
    The number of bytes, header included; at most `wire.nbytes(payload)`.
  """
  return wire.nbytes(_coded(payload))


def golomb_parameter(density: float) -> int:
  """The best number of remainder bits, b, for the gaps between positions.

  Sattler et al., the STC paper, 2019 (arXiv 1903.02891).

  Args:
    density: fraction of the entries that are sent, in (0, 1).
  """
  golden = (math.sqrt(5) - 1) / 2
  ratio = math.log(golden) / math.log1p(-density)
  return max(0, 1 + math.floor(math.log2(ratio)))


def golomb_bits(density: float, parameter: int) -> float:
  """The expected bits of a position: its remainder and its quotient."""
  return parameter + 1 / (1 - (1 - density) ** 2**parameter)


def golomb_pack(indices: Int[np.ndarray, " count"], size: int) -> bytes:
  """Packs the indices of some entries of a vector.

  Each gap is its quotient by 2**b in unary, ones before a zero, and then the b
  bits of its remainder, low bits first.

  Args:
    indices: at least one index, in increasing order.
    size: the length of the vector.

  Returns:
    The packed bytes; none if `indices` are all entries.
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
  """The indices that `golomb_pack` packed: int64 [count]."""
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
  """The bits that an arithmetic code takes which learns the frequencies.

  The probability of a code is (its occurrences so far + 1) / (all codes so far
  + `count`). The order of the codes does not change the sum, and no table is
  sent.

  Args:
    codes: the codes, in [0, count).
    count: the number of different codes.
  """
  from scipy import special

  seen = np.bincount(codes, minlength=count)
  total = special.gammaln(seen.sum() + count) - special.gammaln(count)
  return float(total - special.gammaln(seen + 1).sum()) / math.log(2)


def _coded(node: Any) -> Any:
  """The payload, with shapes of the coded length in place of coded parts."""
  parts: dict[str, Any] = {}
  if isinstance(node, sparse.Sparse):
    parts["support"] = _shorter(node.support, _support_nbytes(node))
  if type(node) in _CODES:
    codes, count = _CODES[type(node)](node)
    # The end of an arithmetic code takes at most two bits.
    bits = 2 + adaptive_bits(np.asarray(codes), count)
    parts["codes"] = _shorter(node.codes, math.ceil(bits / 8))
  if hasattr(node, "values"):
    parts["values"] = _coded(node.values)
  return dataclasses.replace(node, **parts) if parts else node


# For each payload that has codes: the unpacked codes, and how many there are.
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
