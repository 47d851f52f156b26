"""Classification heads: pooling, and a dense layer without LoRA factors.

The kernel and bias of the head are in the collection "lora", beside the
factors, and are trained and sent with them. In PEFT the head is one of the
`modules_to_save`.
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
  """A head that scores the labels of a row. It replaces next-token logits.

  Attributes:
    labels: the number of labels.
    pooling: the state that is scored: the "last" token (decoders), the "first"
      token (encoders, through the pooler if there is one), or the "mean" over
      tokens. None for the pooling that transformers uses.
    multi_label: whether a row may have several labels. If True, the loss takes
      a sigmoid of each score. If False, it takes a softmax over all scores.
    names: the names of the labels; empty if they have none.
  """

  labels: int
  pooling: Literal["last", "first", "mean"] | None = None
  multi_label: bool = False
  names: tuple[str, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "names", tuple(self.names))
    if self.names and len(self.names) != self.labels:
      raise ValueError(
        f"Classifier expected {self.labels} names, one for each label, got"
        f" {len(self.names)}."
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
        f"expected pooling {' or '.join(map(repr, poolings))} for this model,"
        f" got {self.pooling!r}."
      )


def pool(
  x: Float[Array, "batch time d"],
  segments: Int[Array, "batch time"] | None,
  pooling: str,
) -> Float[Array, "batch d"]:
  """Returns one state for each row; ignores padding, where `segments` is 0."""
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
  """A dense layer without LoRA factors, computed in float32.

  Attributes:
    features: the size of the output.
    use_bias: whether a bias is added.
    trained: whether the parameters are trained. If True, they are in the
      collection "lora". If False, they are in "params", with the base weights.
  """

  features: int
  use_bias: bool
  trained: bool

  @nn.compact
  def __call__(
    self, x: Float[Array, "batch d"]
  ) -> Float[Array, "batch {self.features}"]:
    """Returns the scores in float32."""
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
  """Draws the kernel of a new head: normal with standard deviation 0.02."""
  return 0.02 * jax.random.normal(key, shape)


def complete(
  params: Mapping[str, Any], shapes: Mapping[str, Any], key: Any
) -> dict[str, Any]:
  """Returns the parameters of a model, with a new head if they lack one.

  Args:
    params: the parameters of a base model, with or without a head.
    shapes: the shapes of all parameters of the model, including the head.
    key: the random key. `lora.init` draws the same head from the same key.
  """
  flat: Any = flax.traverse_util.flatten_dict(dict(params))
  expected: Any = flax.traverse_util.flatten_dict(dict(shapes))
  for path in expected.keys() - flat.keys():
    name_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
    shape = expected[path].shape
    is_bias = path[-1] == "bias"
    flat[path] = jnp.zeros(shape) if is_bias else draw(name_key, shape)
  return flax.traverse_util.unflatten_dict(flat)
