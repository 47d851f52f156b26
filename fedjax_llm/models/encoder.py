"""The parts that encoders share: dense layers, norms, two-sided attention.

Modules have the names of transformers, so the parameter tree shows the tensor
names of a checkpoint and the names of LoRA targets.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from fedjax_llm.models import attention, hub_config, lora, stack

_tanh_gelu = lambda x: nn.gelu(x, approximate=True)
ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_new": _tanh_gelu,
  "gelu_pytorch_tanh": _tanh_gelu,
  "relu": nn.relu,
  "silu": nn.silu,
}
# Fields of a config.json that only the training of the base model used.
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def read(
  kind: Any, fields: Mapping[str, Any], ignored: Iterable[str] = ()
) -> Any:
  """Makes a config from the fields of a config.json.

  Args:
    kind: the dataclass of the config. Its fields are named as in config.json.
    fields: the fields of the config.json.
    ignored: the names of further fields that do not change hidden states.

  Raises:
    ValueError: if a field is missing or not supported.
  """
  given = hub_config.Fields(fields)
  given.choose("model_type", (kind.model_type,))
  values = given.take(x.name for x in dataclasses.fields(kind))
  given.finish(kind.model_type, (*_DROPOUTS, *ignored))
  return hub_config.build(kind, values)


def check(config: Any) -> None:
  """Checks the number of heads and the activation of a config.

  Raises:
    ValueError: if the heads do not divide the hidden size, or the activation is
      unknown.
  """
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
  """Returns a layer norm that computes its moments in float32."""
  return nn.LayerNorm(
    config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name
  )


class Layer(nn.Module):
  """A part of an encoder, with the config, adapter and dtype of the model."""

  config: Any
  adapter: lora.LoRA | None
  dtype: Any

  def norm(self, name: str) -> nn.LayerNorm:
    """Returns a layer norm with the epsilon and dtype of the model."""
    return norm(self.config, self.dtype, name)

  def dense(
    self, name: str, features: int, use_bias: bool = True
  ) -> lora.Dense:
    """Returns a dense layer, with LoRA factors if it is a target."""
    return lora.Dense(features, self.adapter, use_bias, self.dtype, name=name)

  def attend(
    self,
    names: Sequence[str],
    x: Float[Array, "batch time d"],
    mask: Bool[Array, "rows 1 time time"] | None,
    deterministic: bool,
    use_bias: bool = True,
  ) -> Float[Array, "batch time d"]:
    """Computes self-attention without the output projection.

    Args:
      names: the names of the query, key and value projections.
      x: the states.
      mask: True where a query sees a key; None if every query sees every key.
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
  """Returns a module that applies the layers of an encoder.

  Args:
    block: the module class of a layer. It is called as
      `block(x, mask, deterministic)` and returns `(x, None)`.
    model: the encoder that has the layers.
  """
  return stack.layers(block, model, (nn.broadcast, nn.broadcast))
