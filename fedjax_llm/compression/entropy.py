"""The length that a message would have if it could depend on its data.

Under `jit` the length of a message is static. Some papers also use codes whose
length depends on the data: STC codes the gaps between positions (Golomb, 1966),
and QSGD codes the levels, most of which are zero. `nbytes` measures on the host
how short a real payload would become. It is only a metric: no message is sent
in this form.
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


def golomb_nbytes(indices: Int[np.ndarray, " count"], size: int) -> int:
  """The length in bytes of the Golomb code of some positions of a vector.

  A gap is coded as its quotient by 2**b in unary (ones, then a zero), followed
  by its remainder in b bits.

  Args:
    indices: at least one index, in increasing order.
    size: the length of the vector.

  Returns:
    The number of bytes; 0 if every entry is sent.
  """
  count = len(indices)
  if count == size:
    return 0
  parameter = golomb_parameter(count / size)
  quotients = (np.diff(indices, prepend=-1) - 1) >> parameter
  return math.ceil((quotients.sum() + count * (1 + parameter)) / 8)


def adaptive_bits(codes: Int[np.ndarray, " n"], count: int) -> float:
  """The length in bits of an arithmetic code that learns the frequencies.

  The probability of a code is (its occurrences so far + 1) / (all codes so far
  + `count`). The order of the codes does not change the sum, and no table is
  sent.

  Args:
    codes: the codes, in [0, count).
    count: the number of different codes.
  """
  seen = np.bincount(codes, minlength=count).tolist()
  total = math.lgamma(sum(seen) + count) - math.lgamma(count)
  return (total - sum(math.lgamma(x + 1) for x in seen)) / math.log(2)


def _coded(node: Any) -> Any:
  """Returns the payload; coded parts become shapes of their coded length."""
  parts: dict[str, Any] = {}
  if isinstance(node, sparse.Sparse):
    indices = supports.unpack(node.support, node.size, node.values.size)
    length = golomb_nbytes(np.asarray(indices), node.size)
    parts["support"] = _shorter(node.support, length)
  if type(node) in _CODES:
    codes, count = _CODES[type(node)](node)
    # The end of an arithmetic code takes at most two bits.
    bits = 2 + adaptive_bits(np.asarray(codes), count)
    parts["codes"] = _shorter(node.codes, math.ceil(bits / 8))
  if hasattr(node, "values"):
    parts["values"] = _coded(node.values)
  return dataclasses.replace(node, **parts) if parts else node


# For each class with codes: payload -> its codes, and how many codes exist.
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


def _shorter(packed: Any, length: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((min(packed.size, length),), np.uint8)
