"""Classification: what pools a row, and the head that is trained whole.

The head's kernel and bias live in the collection "lora", beside the factors:
they are trained, compressed and sent together (`modules_to_save` in PEFT).
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Classifier:
  """Scores of a whole row, in place of a language model's logits.

  Attributes:
    labels: how many.
    pooling: the state of the "last" token (decoders), of the "first" one
      (encoders, through the pooler of those that have one), or the "mean" over
      tokens. None for what transformers does with the model at hand.
    multi_label: whether a row may have several labels: a sigmoid of each
      score in place of a softmax over all.
    names: of the labels, where they have any.
  """

  labels: int
  pooling: Literal["last", "first", "mean"] | None = None
  multi_label: bool = False
  names: tuple[str, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "names", tuple(self.names))
    if self.names and len(self.names) != self.labels:
      raise ValueError(
        f"Classifier expected {self.labels} names, got {len(self.names)}."
      )
    if self.labels < 1:
      raise ValueError(f"Classifier expected labels >= 1, got {self.labels}.")
    if self.pooling not in (None, "last", "first", "mean"):
      raise ValueError(
        'Classifier expected pooling "last", "first", "mean" or None, got'
        f" {self.pooling!r}."
      )

  def check(self, *poolings: str) -> None:
    """Raises a `ValueError` unless the pooling is None or one of `poolings`."""
    if self.pooling not in (None, *poolings):
      raise ValueError(
        f"expected pooling {' or '.join(map(repr, poolings))} of this model,"
        f" got {self.pooling!r}."
      )


def pool(
  x: Float[Array, "batch time d"],
  segments: Int[Array, "batch time"] | None,
  pooling: str,
) -> Float[Array, "batch d"]:
  """One state a row; `segments` is 0 where there is padding."""
  batch, time, _ = x.shape
  if segments is None:
    segments = jnp.ones((batch, time), jnp.int32)
  real = segments > 0
  if pooling == "mean":
    total = jnp.einsum("btd,bt->bd", x, real.astype(x.dtype))
    return total / jnp.maximum(real.sum(1), 1)[:, None].astype(x.dtype)
  place = jnp.argmax(real, axis=1)
  if pooling == "last":
    place = time - 1 - jnp.argmax(real[:, ::-1], axis=1)
  return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]


class Head(nn.Module):
  """A dense layer that is trained whole.

  Attributes:
    features: size of the output.
    use_bias: whether a bias is added.
    trained: whether it is in the collection "lora", with what is trained, or
      in "params", with the frozen weights of a finished model.
  """

  features: int
  use_bias: bool
  trained: bool

  @nn.compact
  def __call__(
    self, x: Float[Array, "batch d"]
  ) -> Float[Array, "batch {self.features}"]:
    """Scores in float32."""
    collection = "lora" if self.trained else "params"
    shape = (x.shape[-1], self.features)
    kernel = self.variable(
      collection, "kernel", lambda: draw(self.make_rng("params"), shape)
    ).value
    y = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
    if self.use_bias:
      bias = self.variable(
        collection, "bias", lambda: jnp.zeros(self.features)
      ).value
      y = y + bias.astype(jnp.float32)[None]
    return y


def draw(key: Any, shape: tuple[int, ...]) -> Float[Array, "d labels"]:
  """The kernel of a new head: normal, of standard deviation 0.02."""
  return 0.02 * jax.random.normal(key, shape)


def complete(
  params: Mapping[str, Any], shapes: Mapping[str, Any], key: Any
) -> dict[str, Any]:
  """The parameters of a finished model, with a new head if they lack one.

  Args:
    params: of a base model, with a head or without.
    shapes: of all parameters of the model, its head among them.
    key: of the draw; the head is that of `lora.init`.
  """
  flat: Any = flax.traverse_util.flatten_dict(dict(params))
  expected: Any = flax.traverse_util.flatten_dict(dict(shapes))
  for path in expected.keys() - flat.keys():
    name_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
    shape = expected[path].shape
    is_bias = path[-1] == "bias"
    flat[path] = jnp.zeros(shape) if is_bias else draw(name_key, shape)
  return flax.traverse_util.unflatten_dict(flat)
