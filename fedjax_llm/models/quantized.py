"""Frozen kernels in 8 or 4 bits: a code per weight and an absmax per block.

A weight is `level(code) * absmax`, where absmax is the largest magnitude in its
block. `Int8` and `NF4` are pytrees that replace a kernel in a parameter tree,
so scans over layers and `vmap` over clients work unchanged. `matmul`
dequantises the kernel each time it is used.

qwix's QArray is not used, because its blocks must divide the inputs. A block of
64 does not divide the 172 inputs of stories260k.

benchmarks/results/quantized_base.json has the errors of the formats. The loss
of stories260k, which is 64 channels wide, rises from 1.6496 nats per token to
1.6497 in int8 and to 1.8455 in NF4.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Format = Literal["int8", "nf4"]

# The size of a block in NF4: consecutive inputs of one output.
BLOCK = 64
# The levels of NF4 (QLoRA, Dettmers et al., 2023, appendix E): zero, and
# quantiles of a normal distribution, scaled to [-1, 1].
LEVELS = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """A kernel whose weights are `codes / 127 * absmax`.

  Attributes:
    codes: int8 [*layers, inputs, outputs], from -127 to 127.
    absmax: float32 [*layers, 1, outputs], the largest magnitude of each output.
  """

  codes: Any
  absmax: Any

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the kernel."""
    return self.codes.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4:
  """A kernel whose weights are `LEVELS[code] * absmax`, two codes per byte.

  Attributes:
    codes: uint8 [*layers, ceil(inputs / 2), outputs]. The low bits belong to
      the first half of the inputs, the high bits to the second half.
    absmax: float32 [*layers, ceil(inputs / 64), outputs], the largest magnitude
      of each block of 64 inputs; the last block may be shorter.
    inputs: the number of inputs.
  """

  codes: Any
  absmax: Any
  inputs: int = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the kernel."""
    return (*self.codes.shape[:-2], self.inputs, self.codes.shape[-1])


def quantize(
  kernel: Float[Array, "*layers inputs outputs"], format: Format
) -> Int8 | NF4:
  """Quantises a kernel to the nearest levels.

  A weight moves by at most half the distance between neighbouring levels: by
  `absmax / 254` in int8, and by at most `0.152 * absmax` in NF4. A kernel that
  was dequantised to float32 is quantised to the same codes again. A block whose
  absmax is below 2^-126 becomes zero. A block whose absmax is above 2^126 or
  NaN becomes NaN.

  Args:
    kernel: the kernel. Leading axes are layers, which are quantised separately.
    format: "int8" or "nf4". "int8" has one absmax per output. "nf4" has one per
      64 inputs of an output, about 4.5 bits per weight (QLoRA, Dettmers et al.,
      2023, without the second quantisation of the absmax).

  Raises:
    ValueError: if the format is unknown, or `kernel` is not an array of two or
      more dimensions.
  """
  if format not in ("int8", "nf4"):
    raise ValueError(f"expected the format 'int8' or 'nf4', got {format!r}.")
  if isinstance(kernel, Int8 | NF4) or kernel.ndim < 2:
    raise ValueError(
      "quantize expected an array [*layers, inputs, outputs], got"
      f" {type(kernel).__name__} of shape {kernel.shape}."
    )
  return _int8(kernel) if format == "int8" else _nf4(kernel)


def dequantize(
  kernel: Int8 | NF4 | Float[Array, "*layers inputs outputs"], dtype: Any
) -> Float[Array, "*layers inputs outputs"]:
  """Returns the kernel as an array of `dtype`; casts one that is an array."""
  if isinstance(kernel, Int8):
    weights = kernel.codes.astype(jnp.float32) / 127 * kernel.absmax
  elif isinstance(kernel, NF4):
    halves = [kernel.codes & 15, kernel.codes >> 4]
    codes = jnp.concatenate(halves, axis=-2)[..., : kernel.inputs, :]
    # Nested `where` calls would keep 16 broadcast levels in memory.
    levels = jnp.asarray(LEVELS, jnp.float32)
    levels = levels.at[codes].get(mode="promise_in_bounds")
    weights = levels * _spread(kernel.absmax, kernel.inputs)
  else:
    weights = kernel
  return weights.astype(dtype)


def matmul(
  x: Float[Array, "rows inputs"],
  kernel: Int8 | NF4 | Float[Array, "inputs outputs"],
) -> Float[Array, "rows outputs"]:
  """Returns `x @ kernel` in the dtype of `x`.

  The backward pass dequantises the kernel again. Otherwise a scan over layers
  would keep the dequantised kernels of all layers.
  """
  product = lambda x, kernel: x @ dequantize(kernel, x.dtype)
  return jax.checkpoint(product, prevent_cse=False)(x, kernel)


def _absmax(kernel, axis):
  absmax = jnp.abs(kernel).max(axis, keepdims=True)
  # XLA divides by multiplying with a reciprocal and flushes subnormal numbers
  # to zero, so absmax and its reciprocal must both be normal numbers.
  smallest = jnp.finfo(jnp.float32).tiny
  absmax = jnp.where(absmax < smallest, 0.0, absmax)
  return jnp.where(absmax <= 1 / smallest, absmax, jnp.nan)


def _normalized(kernel, absmax):
  """Scales the kernel to [-1, 1]; blocks of zeros stay zero."""
  return kernel / jnp.where(absmax == 0, 1.0, absmax)


@jax.jit
def _int8(kernel):
  kernel = kernel.astype(jnp.float32)
  absmax = _absmax(kernel, -2)
  codes = jnp.round(_normalized(kernel, absmax) * 127)
  return Int8(codes.astype(jnp.int8), absmax)


@jax.jit
def _nf4(kernel):
  kernel = kernel.astype(jnp.float32)
  *layers, inputs, outputs = kernel.shape
  no_padding = [(0, 0)] * len(layers)
  padding = [*no_padding, (0, -inputs % BLOCK), (0, 0)]
  blocks = jnp.pad(kernel, padding).reshape(*layers, -1, BLOCK, outputs)
  absmax = _absmax(blocks, -2)[..., 0, :]
  normalized = _normalized(kernel, _spread(absmax, inputs))
  codes = jnp.zeros(kernel.shape, jnp.uint8)
  for below, above in zip(LEVELS, LEVELS[1:], strict=False):
    codes += normalized > (below + above) / 2
  codes = jnp.pad(codes, [*no_padding, (0, inputs % 2), (0, 0)])
  low, high = jnp.split(codes, 2, axis=-2)
  return NF4(low | high << 4, absmax, inputs)


def _spread(absmax, inputs):
  """Repeats the absmax of each block for each of its inputs."""
  return jnp.repeat(absmax, BLOCK, axis=-2)[..., :inputs, :]
