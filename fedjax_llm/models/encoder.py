"""The parts that encoders share: configs, norms and two-sided attention.

Modules have the same names as in transformers, so the paths in the parameter
tree match the tensors of a checkpoint and the targets of LoRA.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from fedjax_llm.models import attention, hub_config, stack

# Fields of a config.json that matter only for training the base model.
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
  values = given.take({x.name: x.name for x in dataclasses.fields(kind)})
  given.finish(kind.model_type, (*_DROPOUTS, *ignored))
  return hub_config.build(kind, values)


def norm(module: Any, name: str) -> nn.LayerNorm:
  """Returns a layer norm that computes mean and variance in float32.

  Args:
    module: the module of the norm, with a `config` and a `dtype`.
    name: the name of the norm.
  """
  return nn.LayerNorm(
    module.config.layer_norm_eps,
    dtype=module.dtype,
    use_fast_variance=False,
    name=name,
  )


def attend(
  layer: stack.Layer,
  names: Sequence[str],
  x: Float[Array, "batch time d"],
  mask: Bool[Array, "rows 1 time time"] | None,
  use_bias: bool = True,
) -> Float[Array, "batch time d"]:
  """Computes self-attention without the output projection.

  Args:
    layer: the layer of the projections.
    names: the names of the query, key and value projections.
    x: the states.
    mask: True where a query sees a key; None if every query sees every key.
    use_bias: whether the projections have biases.
  """
  batch, time, width = x.shape
  heads = layer.config.num_attention_heads
  query, key, value = (
    layer.dense(name, x, width, use_bias).reshape(batch, time, heads, -1)
    for name in names
  )
  y = attention.attend(query, key, value, mask, causal=False)
  return y.reshape(x.shape)
