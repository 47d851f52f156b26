"""The best linear codec of recorded updates: principal components."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_llm.compression import base, wire


@wire.message(tag=17)
class Latent:
  """The code of a vector of `size` entries, by a codec both ends know."""

  values: Any
  size: int


class Basis(NamedTuple):
  """What both ends know.

  Attributes:
    mean: of the recorded vectors.
    components: orthonormal, those of the largest variance first.
  """

  mean: Float[Array, " n"]
  components: Float[Array, "k n"]


def fit(snapshots: Float[Array, "count n"], components: int) -> Basis:
  """The principal components of recorded vectors.

  By the Gram matrix of the snapshots, of which there are fewer than entries.
  With as many components as there are snapshots, less one for the mean, each
  snapshot comes back.

  Args:
    snapshots: recorded vectors, two or more.
    components: how many, in [1, count - 1].

  Raises:
    ValueError: if there are too few snapshots for so many.
  """
  count = len(snapshots)
  if not 1 <= components < count:
    raise ValueError(
      f"fit expected components in [1, {count - 1}], fewer than the {count}"
      f" snapshots, got {components=}. Record more of them."
    )
  mean = snapshots.mean(axis=0)
  centred = snapshots - mean[None]
  values, vectors = jnp.linalg.eigh(_product(centred, centred.T))
  # In ascending order. What has no variance has no direction, and stays zero.
  values, vectors = values[::-1][:components], vectors[:, ::-1][:, :components]
  has_variance = values > 1e-7 * values[0]
  scales = jnp.where(has_variance, values, 1) ** -0.5 * has_variance
  return Basis(mean, _product((vectors * scales[None]).T, centred))


def pca(basis: Basis) -> base.Compressor:
  """Sends the coordinates of a vector in a basis that both ends know.

  Args:
    basis: of `fit`; it travels once, and is no part of a message.

  Returns:
    A `Compressor` whose payload is a `Latent`, for quantisers after it in a
    `chain`.
  """

  def encode(vector, key):
    del key  # Deterministic.
    if vector.shape != basis.mean.shape:
      raise ValueError(
        f"the basis is of vectors of {basis.mean.size} entries, got"
        f" {vector.shape}. A codec serves the adapter that it was fitted on."
      )
    values = _product(basis.components, vector - basis.mean)
    return Latent(values, vector.size)

  def decode(payload):
    expected = len(basis.components), basis.mean.size
    if (payload.values.size, payload.size) != expected:
      raise ValueError(
        f"the basis has {expected[0]} components of vectors of {expected[1]}"
        f" entries, the message {payload.values.size} of {payload.size}."
      )
    return basis.mean + _product(payload.values, basis.components)

  return base.stateless(encode, decode)


def setup_bytes(basis: Basis) -> int:
  """How many bytes a client gets once: the basis, as a message in float32."""
  numbers = basis.mean.size + basis.components.size
  return wire.nbytes(base.Dense(jax.ShapeDtypeStruct((numbers,), jnp.float32)))


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
  # Accelerators would round factors to fewer bits.
  return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
