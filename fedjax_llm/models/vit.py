"""ViT, the Vision Transformer (Dosovitskiy et al., 2021).

transformers has renamed the modules of ViT, but not the tensors in its files:
it stores `vit.layers.0.attention.q_proj` as
`vit.encoder.layer.0.attention.attention.query`. PEFT stores the new names.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_llm.models import encoder, heads, hub_config, layout, stack

# The dense layers of a block: the name in transformers, then that in files.
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
# Fields of config.json for parts that this model leaves out: the pooler, which
# no classifier reads, and the decoder of masked images.
_IGNORED = ("encoder_stride", "pooler_act", "pooler_output_size")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """The shape of an image encoder, with Hugging Face's fields and defaults.

  Attributes:
    hidden_size: width of the residual stream.
    intermediate_size: width inside the feed-forward block.
    num_hidden_layers: number of blocks.
    num_attention_heads: number of heads; divides `hidden_size`.
    model_type: "vit".
    image_size: size of an image in pixels: the side, or (height, width).
    patch_size: size of a patch in pixels: the side, or (height, width).
    num_channels: number of channels of a pixel.
    qkv_bias: whether query, key and value projections have biases.
    layer_norm_eps: constant that is added to the variance before its root.
    hidden_act: activation, a key of `hub_config.ACTIVATIONS`.
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
        object.__setattr__(self, name, tuple(size))  # Makes it hashable.
    hub_config.check_heads(self)
    hub_config.check_activation(self)
    if 0 in self.grid:
      raise ValueError(
        f"expected image_size >= patch_size, got {self.image_size} and"
        f" {self.patch_size}. Correct config.json."
      )

  @property
  def image(self) -> tuple[int, int, int]:
    """The height, width and channels of an image."""
    return (*_pair(self.image_size), self.num_channels)

  @property
  def patch(self) -> tuple[int, int]:
    """The height and width of a patch."""
    return _pair(self.patch_size)

  @property
  def grid(self) -> tuple[int, int]:
    """The numbers of rows and columns of patches; excess pixels are ignored."""
    height, width, _ = self.image
    return height // self.patch[0], width // self.patch[1]

  @classmethod
  def from_hugging_face(cls, fields: Mapping[str, Any]) -> "ViTConfig":
    """Makes a config from a config.json of any version of transformers.

    The dropouts in the config.json are ignored; see `bert.BertConfig`.

    Raises:
      ValueError: if a field is not supported.
    """
    return encoder.read(cls, fields, _IGNORED)

  def to_hugging_face(
    self, head: heads.Classifier | None = None
  ) -> dict[str, Any]:
    """Returns the fields of a config.json that transformers loads.

    Args:
      head: the classification head, or None.
    """
    kind = "ViTModel" if head is None else "ViTForImageClassification"
    fields = {"architectures": [kind], **hub_config.label_fields(head)}
    return fields | dataclasses.asdict(self)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
  return (size, size) if isinstance(size, int) else size


class Patches(stack.Layer):
  """A linear map of each patch; checkpoints store it as a convolution."""

  @nn.compact
  def __call__(self, pixels):
    """Maps `pixels` [batch, height, width, channels] to [batch, patches, d]."""
    config = self.config
    (rows, columns), (height, width) = config.grid, config.patch
    # The checkpoint's convolution is [out, in, height, width].
    shape = (config.hidden_size, config.num_channels, height, width)
    weight = self.param("weight", nn.initializers.normal(0.02), shape)
    bias = self.param("bias", nn.initializers.zeros, shape[:1])
    pixels = pixels[:, : rows * height, : columns * width].astype(self.dtype)
    patches = pixels.reshape(len(pixels), rows, height, columns, width, -1)
    x = jnp.einsum("brhcwi,oihw->brco", patches, weight.astype(self.dtype))
    x = x.reshape(len(pixels), rows * columns, -1)
    return x + bias.astype(self.dtype)[None, None]


class PatchEmbeddings(stack.Layer):
  """Wraps `Patches`, because transformers has a module of this name."""

  @nn.compact
  def __call__(self, pixels):
    """Embeds the patches of `pixels`."""
    return self.part(Patches, "projection")(pixels)


class Embeddings(stack.Layer):
  """Embeds the image as a class token and one state for each patch."""

  @nn.compact
  def __call__(self, pixels):
    """Embeds `pixels` [batch, height, width, channels] and adds positions."""
    config, draw = self.config, nn.initializers.normal(0.02)
    width, (rows, columns) = config.hidden_size, config.grid
    first = self.param("cls_token", draw, (1, 1, width))
    places = self.param(
      "position_embeddings", draw, (1, 1 + rows * columns, width)
    )
    patches = self.part(PatchEmbeddings, "patch_embeddings")(pixels)
    first = jnp.broadcast_to(first, (len(pixels), 1, width))
    x = jnp.concatenate([first.astype(self.dtype), patches], axis=1)
    return x + places.astype(self.dtype)


class Attention(stack.Layer):
  """Self-attention over the class token and all patches."""

  @nn.compact
  def __call__(self, x):
    """Computes self-attention over `x` [batch, time, hidden]."""
    names = ("q_proj", "k_proj", "v_proj")
    y = encoder.attend(self, names, x, None, self.config.qkv_bias)
    return self.dense("o_proj", y, self.config.hidden_size)


class FeedForward(stack.Layer):
  """Two dense layers with an activation between them."""

  @nn.compact
  def __call__(self, x):
    """Applies the block to `x` [batch, time, hidden]."""
    config = self.config
    y = self.dense("fc1", x, config.intermediate_size)
    y = hub_config.ACTIVATIONS[config.hidden_act](y)
    return self.dense("fc2", y, config.hidden_size)


class Block(stack.Layer):
  """One layer: pre-norm attention and feed-forward with residuals."""

  @nn.compact
  def __call__(self, x):
    """Applies the layer; one step of the scan over layers."""
    y = encoder.norm(self, "layernorm_before")(x)
    x = x + self.part(Attention, "attention")(y)
    y = encoder.norm(self, "layernorm_after")(x)
    return x + self.part(FeedForward, "mlp")(y), None


class ViT(stack.Model):
  """An image encoder: `apply({"params": frozen, "lora": trainable}, pixels)`.

  A head scores the class token (pooling "first" or None), as transformers does.
  """

  LAYERS = LAYERS
  POOLINGS = ("first",)

  @property
  def example(self) -> jax.ShapeDtypeStruct:
    """The shape of an input with one image."""
    return jax.ShapeDtypeStruct((1, *self.config.image), jnp.float32)

  @nn.compact
  def __call__(
    self,
    pixels: Float[Array, "batch height width channels"],
    *,
    deterministic: bool = True,
  ) -> Float[Array, "..."]:
    """Computes the last hidden states, or with a head the scores of each image.

    Args:
      pixels: the images, with the config's size, normalised as in pretraining.
      deterministic: whether dropout is off. Otherwise LoRA dropout is drawn
        from the rng "dropout".

    Returns:
      Hidden states [batch, 1 + patches, hidden] in `dtype`, or scores
      [batch, labels] in float32.

    Raises:
      ValueError: if the images have the wrong shape.
    """
    config = self.config
    if pixels.shape[1:] != config.image:
      raise ValueError(
        f"expected images of (height, width, channels) {config.image}, got"
        f" {pixels.shape[1:]}. Resize the images, or move channels last."
      )
    own = (config, self.adapter, self.dtype, deterministic)
    x = Embeddings(*own, name="embeddings")(pixels)
    x, _ = stack.layers(Block, self, deterministic, [])(x)
    x = encoder.norm(self, "layernorm")(x)
    if self.head is None:
      return x
    trained = self.adapter is not None
    score = heads.Head(self.head.labels, True, trained, name="classifier")
    return score(x[:, 0])
