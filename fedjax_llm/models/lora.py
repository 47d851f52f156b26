"""LoRA: a dense layer whose low-rank factors are in their own collection.

Use: `model.apply({"params": frozen, "lora": trainable}, tokens)`. The layer
does not merge the factors into the base kernel. So `vmap` over clients batches
only the factors, and `x @ kernel` for all clients stays one matrix product.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from fedjax_llm.models import heads, quantized


@dataclasses.dataclass(frozen=True)
class LoRA:
  """A LoRA adapter (Hu et al., 2021): its rank, scale, dropout and targets.

  It behaves as in PEFT. `a` is initialised uniformly in ±1/sqrt(fan_in), and
  `b` with zeros. Dropout is applied to the input of `a`. The product `a @ b` is
  scaled by alpha / rank.

  Attributes:
    rank: the LoRA rank, at least 1.
    alpha: the numerator of the scale.
    dropout: the probability of dropping an input of `a` in training, in [0, 1).
    targets: the dense layers that get factors: names, such as "q_proj", or ends
      of dotted paths, such as "mlp.c_proj".
  """

  rank: int = 8
  alpha: float = 16.0
  dropout: float = 0.0
  targets: tuple[str, ...] = ("q_proj", "v_proj")

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"LoRA expected rank >= 1, got {self.rank}.")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"LoRA expected dropout in [0, 1), got {self.dropout}.")
    if not self.targets or isinstance(self.targets, str):
      raise ValueError(
        "LoRA expected targets with at least one layer, got"
        f" {self.targets!r}. Give a tuple such as ('q_proj', 'v_proj')."
      )
    # A model is hashed, so its adapter must be hashable.
    object.__setattr__(self, "targets", tuple(self.targets))

  @property
  def scale(self) -> float:
    """The factor by which the product `a @ b` is multiplied."""
    return self.alpha / self.rank

  def matches(self, path: str) -> bool:
    """Returns whether the layer at a dotted path is a target, as in PEFT."""
    return any(f".{path}".endswith(f".{target}") for target in self.targets)

  def check(self, layers: Sequence[str]) -> None:
    """Raises a `ValueError` unless every target matches a layer.

    Args:
      layers: the dotted paths of a model's dense layers.
    """
    if unknown := sorted(
      target
      for target in self.targets
      if not any(f".{layer}".endswith(f".{target}") for layer in layers)
    ):
      raise ValueError(
        f"LoRA expected targets that are layers of this model, got {unknown}."
        f" Choose from {', '.join(layers)}."
      )


def _uniform_a(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
  bound = 1 / math.sqrt(shape[-2])
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class Dense(nn.Module):
  """A dense layer: `x @ kernel (+ bias)`, with LoRA factors if it is a target.

  The factors add `scale * dropout(x) @ a @ b`.

  Attributes:
    features: the size of the output.
    adapter: the LoRA adapter, or None. Only its targets get factors.
    use_bias: whether a bias is added.
    dtype: the type of the computation.
  """

  features: int
  adapter: LoRA | None = None
  use_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch inputs"], *, deterministic: bool = True
  ) -> Float[Array, "*batch {self.features}"]:
    """Applies the layer; dropout is off if `deterministic`."""
    inputs = x.shape[-1]
    shape = (*x.shape[:-1], self.features)
    # Flattened, because the gradients of the factors would otherwise contract
    # two dimensions at once, which is slower in XLA:CPU.
    x = x.reshape(-1, inputs).astype(self.dtype)
    draw = nn.initializers.normal(0.02)
    # `self.param` would refuse the leaves of a quantised kernel.
    kernel = self.variable(
      "params",
      "kernel",
      lambda: draw(self.make_rng("params"), (inputs, self.features)),
    ).value
    y = quantized.matmul(x, kernel)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)[None]
    path = ".".join(self.path) or self.name or ""
    if self.adapter is not None and self.adapter.matches(path):
      y = y + self._low_rank(x, self.adapter, deterministic)
    return y.reshape(shape)

  def _low_rank(self, x, adapter, deterministic):
    rank = adapter.rank
    a = self.variable(
      "lora",
      "a",
      lambda: _uniform_a(self.make_rng("lora"), (x.shape[-1], rank)),
    ).value
    b = self.variable(
      "lora", "b", lambda: jnp.zeros((rank, self.features))
    ).value
    x = nn.Dropout(adapter.dropout)(x, deterministic=deterministic)
    # Scaling `x @ a` is cheaper than scaling the larger output.
    low = (x @ a.astype(self.dtype)) * adapter.scale
    return low @ b.astype(self.dtype)


def init(
  model: nn.Module, key: PRNGKeyArray, params: Mapping[str, Any] | None = None
) -> Any:
  """Draws the trainable parameters in float32: factors, and a head if any.

  The base weights are not allocated. A factor depends only on the key and on
  its own path and shape, not on the other targets.

  Args:
    model: a module with an adapter.
    key: the random key.
    params: the parameters of the base model, or None. If they contain the head,
      training starts from it.

  Returns:
    The collection "lora".

  Raises:
    ValueError: if the model has no adapter.
  """
  trained: Any = flax.traverse_util.flatten_dict(dict(params or {}))

  def draw(path, leaf):
    if path in trained:
      return jnp.asarray(trained[path], jnp.float32)
    if path[-1] in ("b", "bias"):
      return jnp.zeros(leaf.shape)
    name_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
    draw_leaf = heads.draw if path[-1] == "kernel" else _uniform_a
    return draw_leaf(name_key, leaf.shape)

  factors = {path: draw(path, leaf) for path, leaf in _shapes(model).items()}
  return flax.traverse_util.unflatten_dict(factors)


def check(model: nn.Module, factors: Mapping[str, Any]) -> None:
  """Raises a `ValueError` unless `factors` fit `model`.

  Call it on factors from a file. Otherwise, factors of layers that are not
  targets would be ignored, and those of another rank would be scaled wrongly.
  """
  expected = {path: leaf.shape for path, leaf in _shapes(model).items()}
  flat: Any = flax.traverse_util.flatten_dict(dict(factors))
  got = {path: np.shape(leaf) for path, leaf in flat.items()}
  if expected == got:
    return
  problems = [
    f"{'/'.join(path)}: expected {expected.get(path, 'no factor')},"
    f" got {got.get(path, 'none')}"
    for path in sorted(expected | got)
    if expected.get(path) != got.get(path)
  ]
  raise ValueError(
    "expected LoRA factors that fit the model, got:\n  "
    + "\n  ".join(problems)
    + "\nGive the model the adapter that the factors were trained with."
  )


def _shapes(model: nn.Module) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  shapes = abstract_variables(model)
  if "lora" not in shapes:
    raise ValueError(
      "expected a model with LoRA factors, got one without. Give it an adapter."
    )
  flat: Any = flax.traverse_util.flatten_dict(shapes["lora"])
  return flat


def abstract_variables(model: nn.Module) -> dict[str, Any]:
  """Returns the shapes of all variables of a model, without computing them."""
  key = jax.random.key(0)
  example: Any = getattr(model, "example", jnp.zeros((1, 1), jnp.int32))
  shapes: Any = jax.eval_shape(
    model.init, {"params": key, "lora": key}, example
  )
  return shapes


def variables(params: Any, factors: Any | None) -> dict[str, Any]:
  """Returns the variables for `model.apply`.

  Args:
    params: the parameters of the base model.
    factors: the trained parameters; None for a model without an adapter.
  """
  return {"params": params} | ({} if factors is None else {"lora": factors})


def merge(params: Any, factors: Any, scale: float) -> Any:
  """Merges trained parameters into a base model.

  Adds `scale * a @ b` to each kernel that has factors, and inserts the head.

  Args:
    params: the parameters of the base model.
    factors: the collection "lora": a subtree of `params` with `a` and `b` in
      place of `kernel`, and possibly a head. `a` and `b` have the leading axes
      (stacked layers) of the kernel.
    scale: `LoRA.scale`.

  Returns:
    `params` with the merged kernels and the head. Kernels keep their dtype; a
    quantised kernel becomes float32.
  """
  if "a" in factors:
    return _add_to_kernel(params, scale * factors["a"] @ factors["b"])
  merged = {
    name: merge(params.get(name, {}), inner, scale)
    if isinstance(inner, Mapping)
    else inner
    for name, inner in factors.items()
  }
  return {**params, **merged}


def add(params: Any, residual: Any) -> Any:
  """Adds dense matrices to kernels, for methods that change the base model.

  Args:
    params: the parameters of the base model.
    residual: a subtree of `params` with `delta` [..., inputs, outputs] in place
      of `kernel`.

  Returns:
    `params` with the sums. Kernels keep their dtype; a quantised kernel becomes
    a float32 array, which takes more memory.
  """
  if "delta" in residual:
    return _add_to_kernel(params, residual["delta"])
  added = {name: add(params[name], inner) for name, inner in residual.items()}
  return {**params, **added}


def _add_to_kernel(params, delta):
  wide = jnp.promote_types(delta.dtype, jnp.float32)
  added = quantized.dequantize(params["kernel"], wide) + delta
  dtype = getattr(params["kernel"], "dtype", wide)
  return {**params, "kernel": added.astype(dtype)}
