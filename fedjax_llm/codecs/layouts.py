"""How the entries of LoRA factors are laid out as the image that a codec sees.

An arrangement is a table of positions, so that packing is a gather and
unpacking a scatter: bitwise exact, whatever the layout.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedjax_llm.federated import parameters

# Six layers of stride two, in the networks of the paper, and reflections at the
# borders of what they leave.
MULTIPLE, LEAST = 64, 128
_FACTORS = ("a", "b")


@dataclasses.dataclass(frozen=True, eq=False)
class Arrangement:
  """A bijection between vectors of `size` and images, but for padding.

  Attributes:
    positions: int32 [height, width], the entry of the vector that is there, or
      `size` for padding, which is zero.
    size: of the vectors.
    digest: a hash of the names and shapes of the leaves and of their places:
      two ends with the same one mean the same entries.
    is_learned: whether the places come from recorded updates, so that a client
      has to be told them; else they follow from the adapter.
  """

  positions: np.ndarray
  size: int
  digest: str
  is_learned: bool = False

  def __eq__(self, other: object) -> bool:
    """Whether both mean the same entries, as static arguments need it."""
    return isinstance(other, Arrangement) and self.digest == other.digest

  def __hash__(self) -> int:
    return hash(self.digest)

  def pack(self, vector: Float[Array, " n"]) -> Float[Array, "height width"]:
    """The image of a vector.

    Raises:
      ValueError: if the vector is of another length.
    """
    if vector.shape != (self.size,):
      raise ValueError(
        f"the arrangement is of vectors of {self.size} entries, got"
        f" {vector.shape}. A codec serves the adapter that it was fitted on."
      )
    vector = jnp.asarray(vector)
    return vector.at[self._places()].get(mode="fill", fill_value=0)

  def unpack(self, image: Float[Array, "height width"]) -> Float[Array, " n"]:
    """The vector of an image.

    Raises:
      ValueError: if the image is of another shape.
    """
    if image.shape != self.positions.shape:
      raise ValueError(
        f"the arrangement is of images of {self.positions.shape}, got"
        f" {image.shape}."
      )
    blank = jnp.zeros(self.size, image.dtype)
    return blank.at[self._places()].set(
      image, mode="drop", unique_indices=self.positions.size == self.size
    )

  def _places(self) -> jax.Array:
    # XLA would spend seconds on computing ahead with millions of constants.
    return jax.lax.optimization_barrier(jnp.asarray(self.positions))


def square(
  trainable: Any,
  modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> Arrangement:
  """CG-FedLLM's: layer by layer, module by module, `a` beside `b` transposed.

  Columns of each module are the [width, rank] of PEFT's A transposed, then
  those of its B. LLaMA-7B at rank 8 is an image of [4096, 2048] (paper, Table
  1; it does not print the order of the blocks, this one is natural).

  Args:
    trainable: LoRA factors of stacked layers, or their shapes.
    modules: names of the layers that have factors, in their order.

  Raises:
    ValueError: if a module is missing, there are other ones, or projections are
      not square, as with grouped queries; `flat` has no such wishes.
  """
  numbers = _numbered(trainable)
  by_module: dict[str, dict[str, np.ndarray]] = {}
  for path, positions in numbers.items():
    *_, module, factor = path.split("/")
    if factor in by_module.setdefault(module, {}):
      raise ValueError(
        f"square expected stacked layers, got {module}/{factor} twice. Take"
        " flat, which arranges any tree."
      )
    by_module[module][factor] = positions
  halves = [name for name, each in by_module.items() if len(each) < 2]
  if set(by_module) != set(modules) or halves:
    raise ValueError(
      f"square expected both factors of {', '.join(modules)}, got those of"
      f" {', '.join(by_module)}{f', but one of {halves}' if halves else ''}."
      " Take flat, which arranges any tree."
    )
  columns = []
  stacked = {
    module: (_stacked(each["a"]), _stacked(each["b"]).swapaxes(1, 2))
    for module, each in by_module.items()
  }
  sides = {x.shape[:2] for pair in stacked.values() for x in pair}
  if len(sides) > 1:
    raise ValueError(
      "square expected projections of as many outputs as inputs in as many"
      f" layers, got (layers, width) {sorted(sides)}. Take flat, which arranges"
      " any tree."
    )
  ((layers, _),) = sides
  for layer in range(layers):
    for module in modules:
      columns += [factor[layer] for factor in stacked[module]]
  return _arranged(trainable, np.concatenate(columns, axis=1))


def flat(trainable: Any, *, height: int | None = None) -> Arrangement:
  """Any tree, row by row in the order of its leaves, zeros at the end.

  Args:
    trainable: any tree of arrays, or their shapes.
    height: of the image, a multiple of 64, 128 or more; None for about a
      square.

  Raises:
    ValueError: if `height` is another one.
  """
  size = _size(trainable)
  if height is None:
    height = max(LEAST, MULTIPLE * round(math.sqrt(size) / MULTIPLE))
  if height < LEAST or height % MULTIPLE:
    raise ValueError(
      f"flat expected a height that is a multiple of {MULTIPLE}, {LEAST} or"
      f" more, got {height=}."
    )
  width = max(LEAST, MULTIPLE * -(-size // (height * MULTIPLE)))
  positions = np.minimum(np.arange(height * width), size)
  return _arranged(trainable, positions.reshape(height, width))


def columns(trainable: Any, *, width: int) -> Arrangement:
  """Any tree, column by column in the order of its leaves.

  A column is then a stretch of one layer's factor, or of few, and each row has
  an entry of every stretch: what differs between layers, modules and factors
  differs between columns, and rows are alike, for `row_network.network`.

  Args:
    trainable: any tree of arrays, or their shapes.
    width: of the image, positive.

  Raises:
    ValueError: if `width` is not.
  """
  return _in_columns(trainable, np.arange(_size(trainable)), width)


def ranked(
  trainable: Any, energies: Float[np.ndarray, " n"], *, width: int
) -> Arrangement:
  """Any tree, entries that move as much as each other in a column.

  As `columns`, but the first column has the entries of least energy, the last
  those of most. Which column an entry is in has to be told once; in a column
  entries keep their order.

  Args:
    trainable: any tree of arrays, or their shapes.
    energies: of each entry of the raveled tree, the mean square of recorded
      updates; not of those that are held out to judge the codec by.
    width: of the image, positive.

  Raises:
    ValueError: if `width` is not, or there are not as many energies as entries.
  """
  if energies.shape != (size := _size(trainable),):
    raise ValueError(
      f"ranked expected energies of {size} entries, got {energies.shape}."
    )
  arrangement = _in_columns(trainable, np.arange(size), width)
  order, height = (
    np.argsort(energies, kind="stable"),
    len(arrangement.positions),
  )
  for start in range(0, size, height):
    order[start : start + height].sort()
  return dataclasses.replace(
    _in_columns(trainable, order, width), is_learned=True
  )


def _numbered(trainable: Any) -> dict[str, np.ndarray]:
  """By path, the position of each entry in the raveled tree."""
  numbers, start = {}, 0
  leaves = jax.tree.leaves(trainable)
  for path, leaf in zip(parameters.paths(trainable), leaves, strict=True):
    count = math.prod(leaf.shape)
    numbers[path] = np.arange(start, start + count).reshape(leaf.shape)
    start += count
  if strange := [x for x in numbers if x.split("/")[-1] not in _FACTORS]:
    raise ValueError(
      f"square arranges LoRA factors alone, got {', '.join(strange)}. Take"
      " flat, which arranges any tree."
    )
  return numbers


def _stacked(positions: np.ndarray) -> np.ndarray:
  return positions if positions.ndim == 3 else positions[None]


def _arranged(trainable, positions):
  leaves = zip(
    parameters.paths(trainable), jax.tree.leaves(trainable), strict=True
  )
  described = [f"{path} {tuple(leaf.shape)}" for path, leaf in leaves]
  positions = positions.astype(np.int32)
  digest = hashlib.sha256("\n".join(described).encode())
  digest.update(repr(positions.shape).encode() + positions.tobytes())
  return Arrangement(positions, _size(trainable), digest.hexdigest()[:16])


def _in_columns(trainable, order, width):
  """Column by column, as `order` has the entries."""
  if width < 1:
    raise ValueError(f"an image expected width >= 1, got {width=}.")
  height = -(-order.size // width)
  padding = np.full(height * width - order.size, order.size)
  positions = np.concatenate([order, padding]).reshape(width, height).T
  return _arranged(trainable, positions)


def _size(trainable):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable))
