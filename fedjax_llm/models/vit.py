"""ViT, the Vision Transformer (Dosovitskiy et al., 2021).

transformers has renamed its modules: `vit.layers.0.attention.q_proj` was
`vit.encoder.layer.0.attention.attention.query`, and still is in the files of
checkpoints. PEFT names adapters by the modules. Both names are read.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_llm.models import encoder, heads, hub_config, layout, lora

# Names of the dense layers of a block, with those that files still have.
_OLDER = {
  "attention.q_proj": "attention.attention.query",
  "attention.k_proj": "attention.attention.key",
  "attention.v_proj": "attention.attention.value",
  "attention.o_proj": "attention.output.dense",
  "mlp.fc1": "intermediate.dense",
  "mlp.fc2": "output.dense",
}
LAYERS = tuple(_OLDER)
LAYOUT = layout.Layout(
  base="vit",
  layers="layers",
  heads=("classifier",),
  # `decoder` is the head of pretraining.
  optional=("pooler", "decoder"),
  renamed=(
    (r"(^|\.)encoder\.layer\.", r"\1layers."),
    *(
      (rf"(layers\.\d+)\.{re.escape(older)}\b", rf"\1.{current}")
      for current, older in _OLDER.items()
    ),
  ),
  ignored=(r"embeddings\.mask_token$",),
  stored=(
    *(
      (rf"(layers\.\d+)\.{re.escape(current)}\b", rf"\1.{older}")
      for current, older in _OLDER.items()
    ),
    (r"^vit\.layers\.", "vit.encoder.layer."),
  ),
)
# Fields of config.json of parts that are not computed here: the pooler, which
# no classifier reads, and the decoder of masked images.
_IGNORED = ("encoder_stride", "pooler_act", "pooler_output_size")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """The shape of an image encoder; fields and defaults are Hugging Face's.

  Attributes:
    hidden_size: width of the residual stream.
    intermediate_size: width inside the feed-forward block.
    num_hidden_layers: number of blocks.
    num_attention_heads: heads, which divide `hidden_size`.
    model_type: "vit".
    image_size: pixels a side, or (height, width).
    patch_size: pixels a side of what becomes one state, or (height, width).
    num_channels: numbers in a pixel.
    qkv_bias: whether query, key and value projections have biases.
    layer_norm_eps: added to the variance before its root.
    hidden_act: one of `encoder.ACTIVATIONS`.
  """

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  model_type: str = "vit"
  image_size: int | tuple[int, int] = 224
  patch_size: int | tuple[int, int] = 16
  num_channels: int = 3
  qkv_bias: bool = True
  layer_norm_eps: float = 1e-12
  hidden_act: str = "gelu"

  def __post_init__(self):
    for name in ("image_size", "patch_size"):
      if isinstance(size := getattr(self, name), list):
        object.__setattr__(self, name, tuple(size))  # A config is hashed.
    encoder.check(self)
    if 0 in self.grid:
      raise ValueError(
        "expected an image_size of at least one patch_size, got"
        f" {self.image_size} and {self.patch_size}."
      )

  @property
  def image(self) -> tuple[int, int, int]:
    """Height, width and channels of an image."""
    return (*_pair(self.image_size), self.num_channels)

  @property
  def patch(self) -> tuple[int, int]:
    """Height and width of a patch."""
    return _pair(self.patch_size)

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches; pixels beyond them are not seen."""
    height, width, _ = self.image
    return height // self.patch[0], width // self.patch[1]

  @classmethod
  def from_hugging_face(cls, fields: Mapping[str, Any]) -> "ViTConfig":
    """Reads the fields of a config.json, written by old or new transformers.

    The dropouts of the base model are settings of its own training, and are
    not applied: fine-tuning here has LoRA's.

    Raises:
      ValueError: for a field that would be computed wrongly because it is not
        honoured here.
    """
    return encoder.read(cls, fields, _IGNORED)

  def to_hugging_face(
    self, head: heads.Classifier | None = None
  ) -> dict[str, Any]:
    """The fields of a config.json that transformers loads.

    Args:
      head: what classifies an image.
    """
    kind = "ViTModel" if head is None else "ViTForImageClassification"
    fields = {"architectures": [kind], **hub_config.label_fields(head)}
    return fields | dataclasses.asdict(self)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
  return (size, size) if isinstance(size, int) else size


class Patches(nn.Module):
  """A linear map of each patch; what is called a convolution in checkpoints."""

  config: ViTConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixels):
    """Maps `pixels` [batch, height, width, channels] to [batch, grid, d]."""
    config = self.config
    (rows, columns), (height, width) = config.grid, config.patch
    # In the order of the checkpoint's convolution: [out, in, height, width].
    shape = (config.hidden_size, config.num_channels, height, width)
    weight = self.param("weight", nn.initializers.normal(0.02), shape)
    bias = self.param("bias", nn.initializers.zeros, shape[:1])
    pixels = pixels[:, : rows * height, : columns * width].astype(self.dtype)
    patches = pixels.reshape(len(pixels), rows, height, columns, width, -1)
    x = jnp.einsum(
      "brhcwi,oihw->brco", patches, weight.astype(self.dtype)
    ).reshape(len(pixels), rows * columns, -1)
    return x + bias.astype(self.dtype)[None, None]


class PatchEmbeddings(nn.Module):
  """The name that transformers has between the embeddings and their map."""

  config: ViTConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixels):
    """Embeds the patches of `pixels`."""
    return Patches(self.config, self.dtype, name="projection")(pixels)


class Embeddings(nn.Module):
  """A state that stands for the image, and one a patch, each in its place."""

  config: ViTConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixels):
    """Embeds `pixels` [batch, height, width, channels]."""
    config, draw = self.config, nn.initializers.normal(0.02)
    width, (rows, columns) = config.hidden_size, config.grid
    first = self.param("cls_token", draw, (1, 1, width))
    places = self.param(
      "position_embeddings", draw, (1, 1 + rows * columns, width)
    )
    patches = PatchEmbeddings(config, self.dtype, name="patch_embeddings")
    first = jnp.broadcast_to(first, (len(pixels), 1, width))
    x = jnp.concatenate([first.astype(self.dtype), patches(pixels)], axis=1)
    return x + places.astype(self.dtype)


class Attention(encoder.Layer):
  """Attention of every patch to every patch."""

  @nn.compact
  def __call__(self, x, mask, deterministic):
    """Attends from `x` [batch, time, hidden] to itself."""
    names, use_bias = ("q_proj", "k_proj", "v_proj"), self.config.qkv_bias
    y = self.attend(names, x, mask, deterministic, use_bias)
    output = self.dense("o_proj", self.config.hidden_size)
    return output(y, deterministic=deterministic)


class FeedForward(encoder.Layer):
  """Two dense layers with an activation between."""

  @nn.compact
  def __call__(self, x, deterministic):
    """Applies the block to `x` [batch, time, hidden]."""
    config = self.config
    wide = self.dense("fc1", config.intermediate_size)
    y = encoder.ACTIVATIONS[config.hidden_act](
      wide(x, deterministic=deterministic)
    )
    return self.dense("fc2", config.hidden_size)(y, deterministic=deterministic)


class Block(encoder.Layer):
  """One layer: pre-norm attention and feed-forward with residuals."""

  @nn.compact
  def __call__(self, x, mask, deterministic):
    """One step of the scan over layers; see `encoder.layers`."""
    shape = (self.config, self.adapter, self.dtype)
    attend = Attention(*shape, name="attention")
    feed_forward = FeedForward(*shape, name="mlp")
    x = x + attend(self.norm("layernorm_before")(x), mask, deterministic)
    y = self.norm("layernorm_after")(x)
    return x + feed_forward(y, deterministic), None


class ViT(nn.Module):
  """An image encoder: `apply({"params": frozen, "lora": trainable}, pixels)`.

  Attributes:
    config: the model's shape.
    adapter: what gets LoRA factors, or None for the base model alone.
    head: what classifies an image by its first state (pooling "first" or
      None), as transformers does.
    dtype: what activations are computed in; scores are always float32.
    remat: recompute activations in the backward pass: much less memory for
      somewhat more time.
  """

  config: ViTConfig
  adapter: lora.LoRA | None = None
  head: heads.Classifier | None = None
  dtype: Any = jnp.float32
  remat: bool = False

  def __post_init__(self):
    """Refuses an adapter or a pooling that this model does not have."""
    if self.adapter is not None:
      self.adapter.check(LAYERS)
    if self.head is not None:
      self.head.check("first")
    super().__post_init__()

  @property
  def example(self) -> jax.ShapeDtypeStruct:
    """Shape of an input of one image."""
    return jax.ShapeDtypeStruct((1, *self.config.image), jnp.float32)

  @nn.compact
  def __call__(
    self,
    pixels: Float[Array, "batch height width channels"],
    *,
    deterministic: bool = True,
  ) -> Float[Array, "..."]:
    """Hidden states after the last norm, or scores of each image.

    Args:
      pixels: the images, scaled as the base model was trained with; of the
        config's size.
      deterministic: False to draw LoRA dropout from the rng "dropout".

    Returns:
      Hidden states [batch, 1 + patches, hidden] in `dtype`, or scores
      [batch, labels] in float32.
    """
    config = self.config
    if pixels.shape[1:] != config.image:
      raise ValueError(
        f"expected images of (height, width, channels) {config.image}, got"
        f" {pixels.shape[1:]}. Resize them, or see that channels are last."
      )
    x = Embeddings(config, self.dtype, name="embeddings")(pixels)
    x, _ = encoder.layers(Block, self)(x, None, deterministic)
    x = encoder.norm(config, self.dtype, "layernorm")(x)
    if self.head is None:
      return x
    trained = self.adapter is not None
    score = heads.Head(self.head.labels, True, trained, name="classifier")
    return score(x[:, 0])
