"""The parts that all models share: attributes, layers and output.

The parameters of all layers are stacked on axis 0, so the layers share one
program.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedjax_llm.models import attention, heads, lora

Part = TypeVar("Part", bound="Layer")


class Model(nn.Module):
  """The attributes of a model.

  Attributes:
    config: the shape of the model.
    adapter: the LoRA adapter; None for the base model alone.
    head: the classification head; None for no head.
    dtype: the type of activations; logits and scores are always float32.
    remat: whether the backward pass recomputes activations. This takes much
      less memory and somewhat more time.
    LAYERS: the dotted paths of the dense layers that LoRA can target.
    POOLINGS: the poolings of a head that fit the model.
  """

  LAYERS: ClassVar[tuple[str, ...]]
  POOLINGS: ClassVar[tuple[str, ...]]
  config: Any
  adapter: lora.LoRA | None = None
  head: heads.Classifier | None = None
  dtype: Any = jnp.float32
  remat: bool = False

  def __post_init__(self):
    """Raises an error if the adapter or the pooling does not fit the model."""
    if self.adapter is not None:
      self.adapter.check(self.LAYERS)
    if self.head is not None:
      self.head.check(*self.POOLINGS)
    super().__post_init__()


class Layer(nn.Module):
  """A layer, or a part of it.

  Attributes:
    config: the shape of the model.
    adapter: the LoRA adapter, or None.
    dtype: the type of activations.
    deterministic: whether dropout is off.
  """

  config: Any
  adapter: lora.LoRA | None
  dtype: Any
  deterministic: bool

  def part(self, kind: type[Part], name: str) -> Part:
    """Returns a part of this layer, with the same attributes."""
    own = (self.config, self.adapter, self.dtype, self.deterministic)
    return kind(*own, name=name)

  def dense(
    self,
    name: str,
    x: Float[Array, "*batch inputs"],
    features: int,
    use_bias: bool = True,
  ) -> Float[Array, "*batch {features}"]:
    """Applies a dense layer, with LoRA factors if it is a target."""
    dense = lora.Dense(features, self.adapter, use_bias, self.dtype, name=name)
    return dense(x, deterministic=self.deterministic)


def check_length(config: Any, length: int) -> None:
  """Raises a `ValueError` if rows are longer than the learned positions."""
  if length > (most := config.max_position_embeddings):
    raise ValueError(
      f"{config.model_type} expected rows of at most {most} tokens, the number"
      f" of its learned positions, got {length}. Shorten the rows."
    )


def layers(
  block: type[nn.Module],
  model: Any,
  deterministic: bool,
  in_axes: Sequence[Any],
) -> Any:
  """Returns a module that applies the layers of a model one after the other.

  Args:
    block: the module class of a layer, with the attributes of `Layer`. It is
      called as `block(x, *inputs)` and returns the new states `x` and an
      output.
    model: the model that has the layers, with the attributes of `Model`.
    deterministic: whether dropout is off.
    in_axes: an axis for each of the `inputs`: 0 if each layer has its own
      slice, or `nn.broadcast` if all layers get the same value.
  """
  # Inside a scan, prevent_cse is not needed and only costs time.
  return nn.scan(
    nn.remat(block, prevent_cse=False) if model.remat else block,
    variable_axes={"params": 0, "lora": 0},
    split_rngs={"params": True, "lora": True, "dropout": True},
    in_axes=tuple(in_axes),
    length=model.config.num_hidden_layers,
  )(model.config, model.adapter, model.dtype, deterministic, name="layers")


def cached_layers(
  block: type[nn.Module],
  model: Any,
  deterministic: bool,
  x: Float[Array, "batch time d"],
  own: Any,
  shared: Sequence[Any],
  cache: attention.Cache | None,
) -> tuple[Float[Array, "batch time d"], attention.Cache | None]:
  """Applies the layers of a decoder, with a cache of keys and values.

  Args:
    block: the module class of a layer, with the attributes of `Layer`. It is
      called as `block(x, (own, past), *shared)` and returns the new states `x`
      and the new `past`, the layer's cached keys and values.
    model: the model that has the layers, with the attributes of `Model`.
    deterministic: whether dropout is off.
    x: the embedded tokens.
    own: an array with one slice for each layer, or None.
    shared: the inputs that all layers share.
    cache: the cache, or None.

  Returns:
    The states after the last layer; and the updated cache, or None.
  """
  past = None if cache is None else (cache.keys, cache.values)
  in_axes = (0, *[nn.broadcast for _ in shared])
  x, past = layers(block, model, deterministic, in_axes)(
    x, (own, past), *shared
  )
  if cache is not None:
    cache = cache._replace(keys=past[0], values=past[1])
  return x, cache


def output(
  model: Any,
  x: Float[Array, "batch time d"],
  segments: Int[Array, "batch time"] | None,
  embed: nn.Embed,
) -> Float[Array, "..."]:
  """Computes the logits or scores of a decoder, in float32.

  Args:
    model: the decoder, with the attributes of `Model`.
    x: the normalised states after the last layer.
    segments: the documents of the tokens; see `models.attention`.
    embed: the token embedding; its matrix is the output layer if they are tied.

  Returns:
    Logits [batch, time, vocab], or scores [batch, labels] if there is a head.
  """
  config, head = model.config, model.head
  if head is not None:
    x = heads.pool(x, segments, head.pooling or "last")
    trained = model.adapter is not None
    return heads.Head(head.labels, False, trained, name="score")(x)
  flat = x.reshape(-1, config.hidden_size)
  if config.tie_word_embeddings:
    logits = embed.attend(flat)
  else:
    unembed = lora.Dense(config.vocab_size, dtype=model.dtype, name="lm_head")
    logits = unembed(flat)
  return jnp.reshape(logits.astype(jnp.float32), (*x.shape[:2], -1))
