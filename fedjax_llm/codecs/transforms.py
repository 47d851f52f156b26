"""Transform codes: updates in coordinates whose variances tell them apart.

The columns of one rank and another of a LoRA factor move together, and some
move much more. Recorded updates tell by how much: each factor is turned to its
principal axes, and of each coordinate the variance is kept, as that of its row
times that of its column, which a few snapshots suffice for. What is left of a
client's own goes to bits by `allocation`.

  transform = transforms.fit(snapshots, trainable)
  codec = transforms.transform_code(transform, bits=0.5)
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float

from fedjax_llm.codecs import allocation, pca
from fedjax_llm.compression import base, wire

# Of the mean variance: what is added to all, so that nothing is never sent.
_LEAST = 1e-3
FILES = ("transform.json", "transform.safetensors")
_VERSION = 1
_SIDES = ("rows", "columns")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["rotations", "variances"],
  meta_fields=["shapes"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
  """What both ends know: 16 bits a number, sent once.

  Attributes:
    rotations: for each leaf, those of the rows and of the columns of its
      matrices, bfloat16 [matrices, side, side], or None where a side stays.
    variances: for each leaf, of rows and of columns, bfloat16 [matrices, side].
    shapes: of the leaves, as [matrices, rows, columns].
  """

  rotations: Any
  variances: Any
  shapes: tuple[tuple[int, int, int], ...]


def fit(
  snapshots: Float[np.ndarray, "count n"], trainable: Any, *, largest: int = 32
) -> Transform:
  """The principal axes of recorded updates, and the variances along them.

  Each snapshot counts as much as any other, whatever its norm.

  Args:
    snapshots: recorded updates; may be memory-mapped.
    trainable: the tree that they are of, or its shapes. Leaves are stacks of
      matrices in their last two dimensions, and left as they are if they have
      only one.
    largest: sides that are longer are not turned: a rotation has as many
      numbers as its side has squared.

  Raises:
    ValueError: if snapshots are of another length, or all zero.
  """
  shapes = _shapes(trainable)
  size = sum(map(math.prod, shapes))
  norms = np.sqrt([np.sum(np.square(x, dtype=np.float64)) for x in snapshots])
  if snapshots.shape[1] != size or not norms.any():
    raise ValueError(
      f"fit expected snapshots of {size} entries that are not all zero, got"
      f" {snapshots.shape}."
    )
  weights = math.sqrt(size) / np.where(norms > 0, norms, np.inf)
  rotations, variances, start = [], [], 0
  for shape in shapes:
    end = start + math.prod(shape)
    leaf = snapshots[:, start:end] * weights[:, None].astype(np.float32)
    leaf, start = leaf.reshape(-1, *shape), end
    turned = [
      _axes(x) if min(x.shape[2:]) > 1 and x.shape[3] <= largest else None
      for x in (leaf.swapaxes(2, 3), leaf)
    ]
    energy = np.mean(np.square(_turn(leaf, *turned)), axis=0) + _LEAST
    rotations.append(tuple(turned))
    variances.append(tuple(energy.mean(x).astype(jnp.bfloat16) for x in (2, 1)))
  return Transform(tuple(rotations), tuple(variances), shapes)


def profile(transform: Transform) -> Float[np.ndarray, " n"]:
  """The variance of each coordinate, as both ends know it."""
  each = []
  for pair in transform.variances:
    rows, columns = (np.asarray(x, np.float64) for x in pair)
    mean = rows.mean(axis=1)[:, None, None]
    each.append((rows[:, :, None] * columns[:, None, :] / mean).ravel())
  return np.concatenate(each)


def rotated(transform: Transform) -> base.Compressor:
  """Sends the coordinates along the principal axes, for a quantiser after it.

  Returns:
    A `Compressor` whose payload is a `Latent`, of as many values.
  """
  size = sum(map(math.prod, transform.shapes))

  def through(vector, turn):
    leaves, start = [], 0
    for shape, pair in zip(transform.shapes, transform.rotations, strict=True):
      end = start + math.prod(shape)
      leaves.append(turn(vector[start:end].reshape(shape), *pair).ravel())
      start = end
    return jnp.concatenate(leaves)

  def encode(vector, key):
    del key  # Deterministic.
    if vector.shape != (size,):
      raise ValueError(
        f"the transform is of vectors of {size} entries, got {vector.shape}. A"
        " codec serves the adapter that it was fitted on."
      )
    return pca.Latent(through(vector.astype(jnp.float32), _turn), size)

  def decode(payload):
    back = lambda leaf, *pair: _turn(leaf, *map(_transposed, pair))
    return through(jnp.asarray(payload.values), back)

  return base.stateless(encode, decode)


def transform_code(
  transform: Transform,
  bits: float,
  *,
  memory: int = 12,
  block: int = 2048,
  unbiased: bool = False,
) -> base.Compressor:
  """Turns updates to their axes, and sends each coordinate as it deserves.

  Under `relative_to` of a share of what the clients received last, it codes
  what that does not foretell.

  Args:
    transform: of `fit`; concrete, as it decides how long a message is.
    bits: of an entry, on average and all included.
    memory: see `trellis`.
    block: see `trellis`.
    unbiased: for means over many clients, see `allocation`; otherwise the error
      of each is least.

  Returns:
    A `Compressor` whose payload is a `Latent`.

  Raises:
    ValueError: if there are too few bits for the headers.
  """
  return base.chain(
    rotated(transform),
    allocation.allocated(
      profile(transform), bits, memory=memory, block=block, unbiased=unbiased
    ),
  )


def setup_bytes(transform: Transform) -> int:
  """How many bytes a client gets once: the transform, as a message."""
  numbers = sum(x.size for x in jax.tree.leaves(transform))
  return wire.nbytes(base.Dense(jax.ShapeDtypeStruct((numbers,), jnp.bfloat16)))


def save(folder: pathlib.Path, transform: Transform) -> None:
  """Writes a transform, as safetensors and what is static as JSON."""
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {
    f"{kind}/{number}/{side}": np.ascontiguousarray(x)
    for kind in ("rotations", "variances")
    for number, pair in enumerate(getattr(transform, kind))
    for side, x in zip(_SIDES, pair, strict=True)
    if x is not None
  }
  safetensors.numpy.save_file(tensors, folder / FILES[1])
  fields = {"version": _VERSION, "shapes": transform.shapes}
  (folder / FILES[0]).write_text(json.dumps(fields) + "\n")


def load(folder: pathlib.Path, trainable: Any) -> Transform:
  """Reads a transform.

  Args:
    folder: what `save` wrote.
    trainable: the tree whose updates it is to serve, or its shapes.

  Raises:
    ValueError: if there is none, it is of another release, or it was fitted to
      leaves of other shapes.
  """
  try:
    fields = json.loads((folder / FILES[0]).read_text())
    tensors = safetensors.numpy.load_file(folder / FILES[1])
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise ValueError(f"cannot read a transform in {folder}: {error}") from error
  if fields.get("version") != _VERSION:
    raise ValueError(
      f"the transform in {folder} has version {fields.get('version')}, this"
      f" release reads version {_VERSION}."
    )
  found, expected = tuple(map(tuple, fields["shapes"])), _shapes(trainable)
  if found != expected:
    raise ValueError(
      f"the transform in {folder} is of matrices {found}, expected {expected}."
      " A codec serves the adapter that it was fitted on: its model, rank and"
      " modules."
    )
  pairs = lambda kind: tuple(
    tuple(tensors.get(f"{kind}/{number}/{side}") for side in _SIDES)
    for number in range(len(found))
  )
  return Transform(pairs("rotations"), pairs("variances"), found)


def _shapes(trainable):
  return tuple(_matrices(x.shape) for x in jax.tree.leaves(trainable))


def _matrices(shape):
  """A leaf's shape as of a stack of matrices."""
  *stack, rows, columns = (1, 1, *shape)
  return math.prod(stack), rows, columns


def _axes(leaf):
  """Principal axes of the last side: [matrices, side, side], in columns."""
  product = np.einsum("nmij,nmik->mjk", leaf, leaf, optimize=True)
  return np.linalg.eigh(product)[1][..., ::-1].astype(jnp.bfloat16)


def _turn(leaf, rows, columns):
  """Coordinates of matrices [..., matrices, rows, columns] along axes."""
  exact = jax.lax.Precision.HIGHEST
  if rows is not None:
    rows = jnp.asarray(rows, jnp.float32)
    leaf = jnp.einsum("mij,...mik->...mjk", rows, leaf, precision=exact)
  if columns is not None:
    columns = jnp.asarray(columns, jnp.float32)
    leaf = jnp.einsum("...mij,mjk->...mik", leaf, columns, precision=exact)
  return leaf


def _transposed(rotation):
  return None if rotation is None else rotation.swapaxes(1, 2)
