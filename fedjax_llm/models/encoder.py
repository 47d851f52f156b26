"""What the encoders share: dense layers and norms, and attention to both sides.

Module names are transformers', so that a checkpoint's tensor names and a LoRA
target's name can be read off the parameter tree. Layers are stacked on axis 0.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from fedjax_llm.models import attention, hub_config, lora

_tanh_gelu = lambda x: nn.gelu(x, approximate=True)
ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_new": _tanh_gelu,
  "gelu_pytorch_tanh": _tanh_gelu,
  "relu": nn.relu,
  "silu": nn.silu,
}
# Fields of a config.json that change nothing but the training of the base.
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def read(
  kind: Any, fields: Mapping[str, Any], ignored: Iterable[str] = ()
) -> Any:
  """Makes the config `kind` of the fields of a config.json.

  Args:
    kind: a dataclass whose fields are named as in config.json.
    fields: what was read.
    ignored: further fields that leave the hidden states as they are.

  Raises:
    ValueError: for a field that is missing, or one that is not honoured.
  """
  given = hub_config.Fields(fields)
  given.choose("model_type", (kind.model_type,))
  own = dataclasses.fields(kind)
  values = given.take(x.name for x in own)
  given.finish(kind.model_type, (*_DROPOUTS, *ignored))
  required = [x.name for x in own if x.default is dataclasses.MISSING]
  if missing := [name for name in required if name not in values]:
    raise ValueError(f"config.json needs the fields {missing}.")
  return kind(**values)


def check(config: Any) -> None:
  """Raises a `ValueError` unless heads and activation of a config are right."""
  if config.hidden_size % config.num_attention_heads:
    raise ValueError(
      "expected num_attention_heads to divide hidden_size, got"
      f" {config.num_attention_heads} and {config.hidden_size}."
    )
  if config.hidden_act not in ACTIVATIONS:
    raise ValueError(
      f"expected hidden_act in {', '.join(ACTIVATIONS)}, got"
      f" {config.hidden_act!r}."
    )


def norm(config: Any, dtype: Any, name: str) -> nn.LayerNorm:
  """A layer norm, its moments in float32."""
  return nn.LayerNorm(
    config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name
  )


class Layer(nn.Module):
  """What the parts of an encoder share: its shape, adapter and dtype."""

  config: Any
  adapter: lora.LoRA | None
  dtype: Any

  def norm(self, name: str) -> nn.LayerNorm:
    """A norm as this model has them."""
    return norm(self.config, self.dtype, name)

  def dense(
    self, name: str, features: int, use_bias: bool = True
  ) -> lora.Dense:
    """A dense layer, with factors if it is a target."""
    return lora.Dense(features, self.adapter, use_bias, self.dtype, name=name)

  def attend(
    self,
    names: Sequence[str],
    x: Float[Array, "batch time d"],
    mask: Bool[Array, "rows 1 time time"] | None,
    deterministic: bool,
    use_bias: bool = True,
  ) -> Float[Array, "batch time d"]:
    """Attends from `x` to itself, before any output projection.

    Args:
      names: of the projections to queries, keys and values.
      x: the states.
      mask: which of them each sees; None for all.
      deterministic: whether dropout is off.
      use_bias: whether the projections have biases.
    """
    batch, time, width = x.shape
    heads = self.config.num_attention_heads
    query, key, value = (
      self.dense(name, width, use_bias)(x, deterministic=deterministic).reshape(
        batch, time, heads, width // heads
      )
      for name in names
    )
    y = attention.attend(query, key, value, mask, causal=False)
    return y.reshape(x.shape)


def layers(block: type[Layer], model: Any) -> Any:
  """The blocks of a model, one after the other.

  Args:
    block: called as `block(x, mask, deterministic)` -> `(x, None)`.
    model: whose config, adapter, dtype and remat they have.
  """
  # prevent_cse is for loops that XLA unrolls; inside a scan it only costs.
  remat = nn.remat(block, prevent_cse=False, static_argnums=(3,))
  return nn.scan(
    remat if model.remat else block,
    variable_axes={"params": 0, "lora": 0},
    split_rngs={"params": True, "lora": True, "dropout": True},
    in_axes=(nn.broadcast, nn.broadcast),
    length=model.config.num_hidden_layers,
  )(model.config, model.adapter, model.dtype, name="layers")
