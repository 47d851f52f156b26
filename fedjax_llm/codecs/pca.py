"""The best linear codec of recorded updates: principal components."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_llm.compression import base, wire

# By default, accelerators multiply in lower precision.
_product = functools.partial(jnp.matmul, precision="highest")


@wire.message(tag=17)
class Latent:
  """The latent of a vector of `size` entries; both ends know the codec."""

  values: Any
  size: int


class Basis(NamedTuple):
  """A linear codec, which both ends know.

  Attributes:
    mean: mean of the recorded vectors.
    components: orthonormal directions, the one of largest variance first. A
      component without variance is zero.
  """

  mean: Float[Array, " n"]
  components: Float[Array, "k n"]


def fit(snapshots: Float[Array, "count n"], components: int) -> Basis:
  """Computes the principal components of recorded vectors.

  They come from the Gram matrix of the snapshots, because there are fewer
  snapshots than entries. With count - 1 components every snapshot is coded
  exactly.

  Args:
    snapshots: recorded vectors, two or more.
    components: number of components, in [1, count - 1].

  Raises:
    ValueError: if `components` is not in [1, count - 1].
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
  # eigh sorts in ascending order. A component without variance becomes zero.
  values, vectors = values[::-1][:components], vectors[:, ::-1][:, :components]
  has_variance = values > 1e-7 * values[0]
  scales = jnp.where(has_variance, values, 1) ** -0.5 * has_variance
  return Basis(mean, _product((vectors * scales[None]).T, centred))


def pca(basis: Basis) -> base.Compressor:
  """Sends the coordinates of a vector in a basis.

  Args:
    basis: result of `fit`. Clients get it once; no message contains it.

  Returns:
    A `Compressor` whose payload is a `Latent`. A quantiser can follow it in a
    `chain`.
  """

  def encode(vector, key):
    del key  # Deterministic.
    require_size("the basis", vector, basis.mean.size)
    values = _product(basis.components, vector - basis.mean)
    return Latent(values, vector.size)

  def decode(payload):
    require_latent("the basis", payload, *basis.components.shape)
    return basis.mean + _product(payload.values, basis.components)

  return base.stateless(encode, decode)


def require_size(name: str, vector: Float[Array, " n"], size: int) -> None:
  """Raises a ValueError unless a codec's vector has `size` entries."""
  hint = "A codec serves the adapter that it was fitted to."
  base.require_size(name, vector, size, hint)


def require_latent(name: str, payload: Latent, values: int, size: int) -> None:
  """Raises a ValueError unless `payload` has the sizes of a codec's latent."""
  got = payload.values.size, payload.size
  if got != (values, size):
    raise ValueError(
      f"{name} expected a latent of {values} entries for a vector of {size},"
      f" got a message with {got[0]} for {got[1]}. Both ends need the same"
      " codec."
    )
