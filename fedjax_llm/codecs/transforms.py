"""Transform codes: updates along principal axes, with bits by variance.

The rows and columns of a LoRA factor are correlated, and some move much more
than others. From recorded updates, `fit` learns the principal axes of each
factor, and the variance of each coordinate along them. A variance is modelled
as a row's variance times a column's variance, so a few snapshots suffice.
`transform_code` rotates an update to these axes, and `allocation` gives more
bits to coordinates with larger variances.

  transform = transforms.fit(snapshots, trainable)
  codec = transforms.transform_code(transform, bits=0.5)
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fedjax_llm.codecs import allocation, pca
from fedjax_llm.compression import base, wire
from fedjax_llm.federated import parameters

# Added to every variance, as a fraction of the mean, so that none is zero.
_LEAST = 1e-3
# The longest side that is rotated: a rotation has side**2 numbers.
_LONGEST = 32


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["rotations", "variances"],
  meta_fields=["shapes", "signature"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
  """What both ends know; a client gets the arrays once.

  Attributes:
    rotations: for each leaf, a pair of rotations, one for the rows and one for
      the columns of its matrices, bfloat16 [matrices, side, side]; None for a
      side that is not rotated.
    variances: for each leaf, the variances of its rows and of its columns, a
      pair of bfloat16 [matrices, side].
    shapes: shape of each leaf, as [matrices, rows, columns]; static.
    signature: `parameters.signature` of the tree that updates are raveled from;
      static.
  """

  rotations: Any
  variances: Any
  shapes: tuple[tuple[int, int, int], ...]
  signature: str


def fit(snapshots: Float[np.ndarray, "count n"], trainable: Any) -> Transform:
  """Learns principal axes from recorded updates, and variances along them.

  Snapshots are weighted equally, whatever their norms.

  Args:
    snapshots: recorded updates; may be memory-mapped.
    trainable: tree that was updated, or its shapes. The last two axes of a leaf
      are the rows and columns of matrices. Leaves with fewer axes are not
      rotated.

  Raises:
    ValueError: if snapshots have another length, or all are zero.
  """
  shapes = tuple(_matrices(x.shape) for x in jax.tree.leaves(trainable))
  size = sum(map(math.prod, shapes))
  norms = np.sqrt([np.sum(np.square(x, dtype=np.float64)) for x in snapshots])
  if snapshots.shape[1] != size or not norms.any():
    raise ValueError(
      f"fit expected snapshots [count, {size}] that are not all zero, got"
      f" {snapshots.shape}."
    )
  weights = math.sqrt(size) / np.where(norms > 0, norms, np.inf)
  rotations, variances, start = [], [], 0
  for shape in shapes:
    end = start + math.prod(shape)
    leaf = snapshots[:, start:end] * weights[:, None].astype(np.float32)
    leaf, start = leaf.reshape(-1, *shape), end
    turned = [
      _axes(x) if min(x.shape[2:]) > 1 and x.shape[3] <= _LONGEST else None
      for x in (leaf.swapaxes(2, 3), leaf)
    ]
    energy = np.mean(np.square(_turn(leaf, *turned)), axis=0) + _LEAST
    rotations.append(tuple(turned))
    variances.append(tuple(energy.mean(x).astype(jnp.bfloat16) for x in (2, 1)))
  signature = parameters.signature(trainable)
  return Transform(tuple(rotations), tuple(variances), shapes, signature)


def profile(transform: Transform) -> Float[np.ndarray, " n"]:
  """Returns the variance of each coordinate along the principal axes."""
  each = []
  for pair in transform.variances:
    rows, columns = (np.asarray(x, np.float64) for x in pair)
    mean = rows.mean(axis=1)[:, None, None]
    each.append((rows[:, :, None] * columns[:, None, :] / mean).ravel())
  return np.concatenate(each)


def to_principal_axes(transform: Transform) -> base.Compressor:
  """Sends the coordinates of a vector along the principal axes.

  Returns:
    A `Compressor` whose payload is a `Latent` with as many values as the
    vector. A quantiser can follow it in a `chain`.
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
    pca.require_size("the transform", vector, size)
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
  unbiased: bool = False,
) -> base.Compressor:
  """Sends updates along their principal axes, with bits by variance.

  Args:
    transform: result of `fit`; concrete, because it decides the message length.
    bits: bits per vector entry, headers and scales included.
    memory: memory of the trellises, see `compression.trellis`.
    unbiased: whether the code is unbiased, which suits a mean over many clients
      (see `allocation`). Otherwise each message has the least error.

  Returns:
    A `Compressor` whose payload is a `Latent`.

  Raises:
    ValueError: if `bits` is too small for the headers.
  """
  return base.chain(
    to_principal_axes(transform),
    allocation.allocated(
      profile(transform), bits, memory=memory, unbiased=unbiased
    ),
  )


def setup_bytes(transform: Transform) -> int:
  """Returns the bytes of the transform, which a client receives once."""
  numbers = sum(x.size for x in jax.tree.leaves(transform))
  return wire.nbytes(base.Dense(jax.ShapeDtypeStruct((numbers,), jnp.bfloat16)))


def _matrices(shape):
  """Returns a leaf's shape as [matrices, rows, columns]."""
  *stack, rows, columns = (1, 1, *shape)
  return math.prod(stack), rows, columns


def _axes(leaf):
  """Principal axes of the last side, as columns: [matrices, side, side]."""
  product = np.einsum("nmij,nmik->mjk", leaf, leaf, optimize=True)
  return np.linalg.eigh(product)[1][..., ::-1].astype(jnp.bfloat16)


def _turn(leaf, rows, columns):
  """Rotates matrices [..., matrices, rows, columns] to coordinates on axes."""
  # By default, accelerators multiply in lower precision.
  product = functools.partial(jnp.einsum, precision="highest")
  if rows is not None:
    rows = jnp.asarray(rows, jnp.float32)
    leaf = product("mij,...mik->...mjk", rows, leaf)
  if columns is not None:
    columns = jnp.asarray(columns, jnp.float32)
    leaf = product("...mij,mjk->...mik", leaf, columns)
  return leaf


def _transposed(rotation):
  return None if rotation is None else rotation.swapaxes(1, 2)
