"""Layouts: where the entries of an update go in the image that a codec encodes.

A layout is a table of positions. Packing is a gather and unpacking is a
scatter, so both are exact to the bit.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedjax_llm.codecs import pca
from fedjax_llm.federated import parameters

# The paper's networks have six layers of stride two, and pad by reflection. So
# sides must be multiples of `_MULTIPLE`, and at least `_LEAST`.
_MULTIPLE, _LEAST = 64, 128
_FACTORS = ("a", "b")


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """A bijection between vectors of `size` entries and images, up to padding.

  Layouts with the same digest are equal, so that they can be static arguments
  of `jit`.

  Attributes:
    positions: int32 [height, width]; the index of the vector entry at each
      pixel, or `size` for padding, which is zero.
    size: number of vector entries.
    signature: `parameters.signature` of the tree that vectors are raveled from.
    is_learned: whether positions come from recorded updates and are sent to
      each client once. If not, they follow from the tree.
  """

  positions: np.ndarray
  size: int
  signature: str
  is_learned: bool = False

  @functools.cached_property
  def digest(self) -> str:
    """A hash of the tree and the positions, 16 hexadecimal digits."""
    told = f"{self.signature} {self.positions.shape}".encode()
    return hashlib.sha256(told + self.positions.tobytes()).hexdigest()[:16]

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Layout) and self.digest == other.digest

  def __hash__(self) -> int:
    return hash(self.digest)

  def pack(self, vector: Float[Array, " n"]) -> Float[Array, "height width"]:
    """Returns the image of a vector.

    Raises:
      ValueError: if the vector has another length.
    """
    pca.require_size("the layout", vector, self.size)
    vector = jnp.asarray(vector)
    return vector.at[self._places()].get(mode="fill", fill_value=0)

  def unpack(self, image: Float[Array, "height width"]) -> Float[Array, " n"]:
    """Returns the vector of an image.

    Raises:
      ValueError: if the image has another shape.
    """
    if image.shape != self.positions.shape:
      raise ValueError(
        f"the layout expected an image of {self.positions.shape}, got"
        f" {image.shape}."
      )
    blank = jnp.zeros(self.size, image.dtype)
    return blank.at[self._places()].set(
      image, mode="drop", unique_indices=self.positions.size == self.size
    )

  def _places(self) -> jax.Array:
    # Without the barrier, XLA folds millions of constants, which takes seconds.
    return jax.lax.optimization_barrier(jnp.asarray(self.positions))


def square(
  trainable: Any,
  modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> Layout:
  """CG-FedLLM's layout: layer by layer, module by module, `a` beside `b`.

  Each module has `rank` columns from `a` [width, rank] and `rank` columns from
  `b` transposed. LLaMA-7B at rank 8 is an image of [4096, 2048] (paper, Table
  1). The paper does not state the order of the blocks.

  Args:
    trainable: LoRA factors of stacked layers, or their shapes.
    modules: names of the layers that have factors, in the order of the image.

  Raises:
    ValueError: if modules are missing or unexpected, or projections are not
      square, as with grouped queries. `flat` takes any tree.
  """
  by_module: dict[str, dict[str, np.ndarray]] = {}
  for path, positions in _numbered(trainable).items():
    *_, module, factor = path.split("/")
    if factor in by_module.setdefault(module, {}):
      raise ValueError(
        f"square expected stacked layers, got {module}/{factor} twice. Take"
        " flat, which takes any tree."
      )
    matrices = positions.reshape(-1, *positions.shape[-2:])
    by_module[module][factor] = matrices
  halves = [name for name, each in by_module.items() if len(each) < 2]
  if set(by_module) != set(modules) or halves:
    raise ValueError(
      f"square expected both factors of {', '.join(modules)}, got those of"
      f" {', '.join(by_module)}"
      f"{f', but only one of {halves}' if halves else ''}."
      " Take flat, which takes any tree."
    )
  stacked = {
    module: (each["a"], each["b"].swapaxes(1, 2))
    for module, each in by_module.items()
  }
  sides = {x.shape[:2] for pair in stacked.values() for x in pair}
  if len(sides) > 1:
    raise ValueError(
      "square expected square projections of the same width and number of"
      f" layers, got (layers, width) {sorted(sides)}. Take flat, which takes"
      " any tree."
    )
  ((layers, _),) = sides
  blocks = [
    factor[layer]
    for layer in range(layers)
    for module in modules
    for factor in stacked[module]
  ]
  return _layout(trainable, np.concatenate(blocks, axis=1))


def flat(trainable: Any) -> Layout:
  """Places any tree row by row, in the order of its leaves, then padding.

  The image is about square. Its sides are multiples of 64, and at least 128.

  Args:
    trainable: tree of arrays, or their shapes.
  """
  size = _size(trainable)
  height = max(_LEAST, _MULTIPLE * round(math.sqrt(size) / _MULTIPLE))
  width = max(_LEAST, _MULTIPLE * -(-size // (height * _MULTIPLE)))
  positions = np.minimum(np.arange(height * width), size)
  return _layout(trainable, positions.reshape(height, width))


def columns(trainable: Any, *, width: int) -> Layout:
  """Places any tree column by column, in the order of its leaves, then padding.

  A column has consecutive entries of one factor of one layer, or of a few. So
  layers, modules and factors differ between columns, while rows are alike, as
  `row_network.network` expects.

  Args:
    trainable: tree of arrays, or their shapes.
    width: width of the image, positive.

  Raises:
    ValueError: if `width` is not positive.
  """
  return _in_columns(trainable, np.arange(_size(trainable)), width)


def ranked(
  trainable: Any, energies: Float[np.ndarray, " n"], *, width: int
) -> Layout:
  """Places entries of similar energy in the same column.

  The first column has the entries with the least energy, the last column those
  with the most. Within a column, entries keep the order of the raveled tree.
  Each client is sent the column of each entry, once.

  Args:
    trainable: tree of arrays, or their shapes.
    energies: mean square of each entry over recorded updates, without the
      held-out ones.
    width: width of the image, positive.

  Raises:
    ValueError: if `width` is not positive, or the number of energies is not the
      number of entries.
  """
  if energies.shape != (size := _size(trainable),):
    raise ValueError(
      f"ranked expected energies of {size} entries, got {energies.shape}."
    )
  height = len(columns(trainable, width=width).positions)
  order = np.argsort(energies, kind="stable")
  for start in range(0, size, height):
    order[start : start + height].sort()
  layout = _in_columns(trainable, order, width)
  return dataclasses.replace(layout, is_learned=True)


def _numbered(trainable: Any) -> dict[str, np.ndarray]:
  """Returns, by path, the index of each entry in the raveled tree."""
  numbers, start = {}, 0
  leaves = jax.tree.leaves(trainable)
  for path, leaf in zip(parameters.paths(trainable), leaves, strict=True):
    count = math.prod(leaf.shape)
    numbers[path] = np.arange(start, start + count).reshape(leaf.shape)
    start += count
  if strange := [x for x in numbers if x.split("/")[-1] not in _FACTORS]:
    raise ValueError(
      f"square expected LoRA factors alone, got {', '.join(strange)}. Take"
      " flat, which takes any tree."
    )
  return numbers


def _layout(trainable, positions):
  signature = parameters.signature(trainable)
  return Layout(positions.astype(np.int32), _size(trainable), signature)


def _in_columns(trainable, order, width):
  """Places entries column by column, in the given order."""
  if width < 1:
    raise ValueError(f"expected an image of width >= 1, got {width=}.")
  height = -(-order.size // width)
  padding = np.full(height * width - order.size, order.size)
  positions = np.concatenate([order, padding]).reshape(width, height).T
  return _layout(trainable, positions)


def _size(trainable):
  return sum(leaf.size for leaf in jax.tree.leaves(trainable))
