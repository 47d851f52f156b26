"""Kernels in int8 and NF4 inside of models: products, gradients, memory."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import decoder, language, lora, quantized

FORMATS = ("int8", "nf4")
LAYERS, WIDTH = 4, 128


@pytest.fixture(params=FORMATS)
def format(request):
  return request.param


class Layer(nn.Module):
  """A LoRA layer of rank 2 whose base product is `product`."""

  product: callable

  @nn.compact
  def __call__(self, x):
    kernel = self.get_variable("params", "kernel")
    a, b = (self.get_variable("lora", name).astype(x.dtype) for name in "ab")
    return nn.tanh(self.product(x, kernel) + x @ a @ b), None


@pytest.fixture(scope="module")
def stack():
  """A frozen stack of kernels, LoRA factors and inputs."""
  draw = np.random.default_rng(2).standard_normal
  kernels = draw((LAYERS, WIDTH, WIDTH)).astype(np.float32) / 12
  factors = {
    "a": draw((LAYERS, WIDTH, 2)).astype(np.float32) / 12,
    "b": draw((LAYERS, 2, WIDTH)).astype(np.float32),
  }
  return kernels, factors, draw((3, WIDTH)).astype(np.float32)


def loss_and_gradients(product=quantized.matmul, dtype=jnp.float32):
  def loss(factors, x, kernels):
    scan = nn.scan(
      Layer,
      variable_axes={"params": 0, "lora": 0},
      split_rngs={},
      length=len(factors["a"]),
    )
    variables = {"params": {"kernel": kernels}, "lora": factors}
    y, _ = scan(product).apply(variables, x.astype(dtype))
    return (y.astype(jnp.float32) ** 2).mean()

  return jax.value_and_grad(loss, argnums=(0, 1))


def test_scanned_layers_compute_with_the_dequantised_kernels(stack, format):
  kernels, factors, x = stack
  frozen = quantized.quantize(kernels, format)
  got = jax.jit(loss_and_gradients())(factors, x, frozen)
  expected = jax.jit(loss_and_gradients(lambda x, kernel: x @ kernel))(
    factors, x, quantized.dequantize(frozen, jnp.float32)
  )
  jax.tree.map(
    lambda got, expected: np.testing.assert_allclose(
      got, expected, rtol=1e-5, atol=1e-5
    ),
    got,
    expected,
  )


def test_base_products_have_no_client_dimension(stack, format, equations):
  kernels, factors, x = stack
  frozen = quantized.quantize(kernels, format)
  clients = jax.tree.map(lambda leaf: np.stack([leaf] * 5), (factors, x))
  step = jax.vmap(loss_and_gradients(), in_axes=(0, 0, None))
  found = equations(step, *clients, frozen)
  base = [
    equation
    for equation in found
    if equation.primitive.name == "dot_general"
    and any(v.aval.shape == (WIDTH, WIDTH) for v in equation.invars)
  ]
  assert len(base) == 2  # Forward, and backward to the activations.
  for equation in base:
    assert equation.params["dimension_numbers"][1] == ((), ())
  shapes = {v.aval.shape for equation in found for v in equation.outvars}
  assert (5, WIDTH, WIDTH) not in shapes


def temporary_kernels(stack, frozen, layers, **kwargs):
  """What a gradient step allocates, in float32 kernels of one layer."""
  kernels, factors, x = stack
  frozen, factors = jax.tree.map(lambda leaf: leaf[:layers], (frozen, factors))
  program = jax.jit(loss_and_gradients(**kwargs)).lower(factors, x, frozen)
  analysis = program.compile().memory_analysis()
  return analysis.temp_size_in_bytes / kernels[0].nbytes


@pytest.mark.parametrize("base", ["float32", *FORMATS])
def test_no_more_than_one_kernel_is_dequantised_at_a_time(stack, base):
  frozen = stack[0]
  if base != "float32":
    frozen = quantized.quantize(frozen, base)
  kwargs = {"dtype": jnp.bfloat16}
  few, many = (temporary_kernels(stack, frozen, n, **kwargs) for n in (2, 4))
  # Inputs of layers and a kernel with its transpose, at two or four bytes.
  assert many < 2.5
  assert many - few < 0.5


def test_without_matmul_all_dequantised_kernels_are_kept(stack, format):
  kwargs = {"product": lambda x, k: x @ quantized.dequantize(k, x.dtype)}
  frozen = quantized.quantize(stack[0], format)
  few, many = (temporary_kernels(stack, frozen, n, **kwargs) for n in (2, 4))
  assert many - few > 1.9


def test_programs_hold_no_weights(stack, format):
  kernels, factors, x = stack
  frozen = quantized.quantize(kernels, format)
  lowered = jax.jit(loss_and_gradients()).lower(factors, x, frozen)
  arguments = jax.tree.leaves((factors, x, frozen))
  analysis = lowered.compile().memory_analysis()
  assert analysis.argument_size_in_bytes == sum(x.nbytes for x in arguments)
  constants = re.findall("dense<([^>]*)>", lowered.as_text())
  # NF4's table is written with 128 hex digits, a kernel would be with 128 Ki.
  assert max(map(len, constants)) < 1024


def test_decoders_compute_with_the_dequantised_kernels(
  config, base_params, lora_factors, tokens, format
):
  model = decoder.Decoder(config, lora.LoRA(3, targets=decoder.LINEAR))
  is_kernel = lambda path: path[0].key == "layers" and path[-1].key == "kernel"
  frozen = jax.tree.map_with_path(
    lambda path, x: quantized.quantize(x, format) if is_kernel(path) else x,
    base_params(config),
  )

  @jax.jit
  def step(factors, params):
    def loss(factors):
      variables = {"params": params, "lora": factors}
      logits = model.apply(variables, tokens[:, :-1])
      targets = jnp.asarray(tokens[:, 1:])
      return language.token_losses(logits, targets).mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(factors)

  factors = lora_factors(model)
  got = step(factors, frozen)
  plain = jax.tree.map(
    lambda x: quantized.dequantize(x, jnp.float32),
    frozen,
    is_leaf=lambda x: not isinstance(x, dict),
  )
  expected = step(factors, plain)
  jax.tree.map(
    lambda got, expected: np.testing.assert_allclose(got, expected, atol=1e-5),
    got,
    expected,
  )
  # The kernels were no representable ones.
  exact = step(factors, base_params(config))
  assert jnp.abs(exact[0][1] - got[0][1]).max() > 1e-3
