"""LoRA: a dense layer whose low-rank factors live in a collection of their own.

`model.apply({"params": frozen, "lora": trainable}, tokens)`: the base kernel is
never merged with the factors, so that `vmap` over clients batches the factors
alone and `x @ kernel` of all clients stays one product.
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
  """Which dense layers get low-rank factors, and how (Hu et al., 2021).

  The semantics are PEFT's: `a` starts uniform in ±1/sqrt(fan_in), `b` at zero,
  dropout acts on the input of `a`, and the product is scaled by alpha / rank.

  Attributes:
    rank: the inner dimension of the factors, at least 1.
    alpha: numerator of the scale.
    dropout: probability in [0, 1) of dropping an input of `a` in training.
    targets: names of the dense layers, such as "q_proj", or ends of their
      dotted paths, such as "mlp.c_proj".
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
        "LoRA expected a sequence of at least one target layer, got"
        f" {self.targets!r}."
      )
    # A model is hashed with what it is made of.
    object.__setattr__(self, "targets", tuple(self.targets))

  @property
  def scale(self) -> float:
    """What the product of the factors is multiplied by."""
    return self.alpha / self.rank

  def matches(self, path: str) -> bool:
    """Whether the layer of that dotted path is a target, as PEFT sees it."""
    return any(f".{path}".endswith(f".{target}") for target in self.targets)

  def check(self, layers: Sequence[str]) -> None:
    """Raises a `ValueError` unless every target is found in `layers`.

    Args:
      layers: dotted paths of a model's dense layers.
    """
    if unknown := sorted(
      target
      for target in self.targets
      if not any(f".{layer}".endswith(f".{target}") for layer in layers)
    ):
      raise ValueError(
        f"LoRA targets {unknown} are no layers of this model. It has:"
        f" {', '.join(layers)}."
      )


def _uniform_a(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
  bound = 1 / math.sqrt(shape[-2])
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class Dense(nn.Module):
  """`x @ kernel (+ bias)`, plus `scale * dropout(x) @ a @ b` if a LoRA target.

  Attributes:
    features: size of the output.
    adapter: only the layers that it names get factors.
    use_bias: whether a bias is added.
    dtype: what the products are computed in.
  """

  features: int
  adapter: LoRA | None = None
  use_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch inputs"], *, deterministic: bool = True
  ) -> Float[Array, "*batch {self.features}"]:
    """Applies the layer; dropout acts unless `deterministic`."""
    inputs = x.shape[-1]
    shape = (*x.shape[:-1], self.features)
    # Two dimensions: with three, the gradients of the factors contract two
    # dimensions at once, which XLA:CPU does more slowly.
    x = x.reshape(-1, inputs).astype(self.dtype)
    draw = nn.initializers.normal(0.02)
    # No `self.param`: it would not take the leaves of a quantised kernel.
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
    # Scaling `a @ b`'s small input is cheaper than scaling its output.
    low = (x @ a.astype(self.dtype)) * adapter.scale
    return low @ b.astype(self.dtype)


def init(
  model: nn.Module, key: PRNGKeyArray, params: Mapping[str, Any] | None = None
) -> Any:
  """Draws what is trained of `model`: float32 factors `a` and `b`, and a head.

  Base weights are not allocated, and nothing as large as the model is compiled.
  Factors of one name and shape are the same whatever other targets there are.

  Args:
    model: a module with an adapter.
    key: of the draws.
    params: the base model's; a head that is among them is where that of
      `model` starts.

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
    of_kind = heads.draw if path[-1] == "kernel" else _uniform_a
    return of_kind(name_key, leaf.shape)

  factors = {path: draw(path, leaf) for path, leaf in _shapes(model).items()}
  return flax.traverse_util.unflatten_dict(factors)


def check(model: nn.Module, factors: Mapping[str, Any]) -> None:
  """Raises a `ValueError` unless `factors` fit `model`.

  Factors of other layers would be ignored and those of another rank scaled
  wrongly, so check what comes from a file.
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
    "the LoRA factors do not fit the model:\n  " + "\n  ".join(problems)
  )


def _shapes(model: nn.Module) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  shapes = abstract_variables(model)
  if "lora" not in shapes:
    raise ValueError("expected a model with LoRA factors; give it an adapter.")
  flat: Any = flax.traverse_util.flatten_dict(shapes["lora"])
  return flat


def abstract_variables(model: nn.Module) -> dict[str, Any]:
  """Shapes of all variables of a model, none of which is computed."""
  key = jax.random.key(0)
  example: Any = getattr(model, "example", jnp.zeros((1, 1), jnp.int32))
  shapes: Any = jax.eval_shape(
    model.init, {"params": key, "lora": key}, example
  )
  return shapes


def merge(params: Any, factors: Any, scale: float) -> Any:
  """Adds `scale * a @ b` to the kernels that have factors; heads are put in.

  Args:
    params: the base model's parameters.
    factors: what was trained: a subtree of the same layout with `a` and `b` in
      place of `kernel`, or a head; leading axes (stacked layers) agree.
    scale: `LoRA.scale`.

  Returns:
    `params` with the merged kernels, in their own dtype; float32 where they
    were quantised.
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
  """Adds dense matrices to kernels, as methods that change the base model do.

  Args:
    params: the base model's parameters.
    residual: a subtree of the same layout with `delta` [..., inputs, outputs]
      in place of `kernel`.

  Returns:
    `params` with the sums, in the types that `merge` returns. A quantised
    kernel becomes dense: such a method needs the memory of what it adapts.
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
