import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import quantized

FORMATS = ("int8", "nf4")


@pytest.fixture(params=FORMATS)
def format(request):
  return request.param


@pytest.fixture(scope="module")
def kernel():
  """Two layers; the last block of NF4 has 44 inputs of 172."""
  generator = np.random.default_rng(0)
  return generator.standard_normal((2, 172, 6)).astype(np.float32)


def roundtrip(kernel, format):
  return quantized.dequantize(quantized.quantize(kernel, format), jnp.float32)


def np_levels(format):
  if format == "int8":
    return np.arange(-127, 128) / 127
  # The published construction (Dettmers et al., 2023): quantiles of a normal
  # distribution, one more on the positive side, scaled to [-1, 1].
  tail = 1 - (1 / 30 + 1 / 32) / 2
  quantile = statistics.NormalDist().inv_cdf
  positive = [quantile(p) for p in np.linspace(tail, 0.5, 9)[:-1]]
  negative = [-quantile(p) for p in np.linspace(tail, 0.5, 8)[:-1]]
  return np.sort([*positive, 0, *negative]) / quantile(tail)


def np_roundtrip(kernel, format):
  """Of one layer, number by number; also half the gap that each fell into."""
  block = len(kernel) if format == "int8" else 64
  levels = np_levels(format)
  weights, halves = np.zeros_like(kernel), np.zeros_like(kernel)
  for i in range(kernel.shape[0]):
    for j in range(kernel.shape[1]):
      start = i // block * block
      absmax = max(abs(x) for x in kernel[start : start + block, j])
      nearest = np.argmin(abs(levels * absmax - kernel[i, j]))
      weights[i, j] = levels[nearest] * absmax
      halves[i, j] = np.diff(levels).max() / 2 * absmax
  return weights, halves


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution():
  # The published ones were computed in float32 from a tail of 7 digits.
  np.testing.assert_allclose(quantized.LEVELS, np_levels("nf4"), atol=3e-7)


@pytest.mark.parametrize("inputs", [1, 63, 65, 172])
def test_formats_match_numpy_for_any_number_of_inputs(kernel, format, inputs):
  layer = kernel[0, :inputs]
  expected, halves = np_roundtrip(layer, format)
  got = roundtrip(layer, format)
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
  assert (np.abs(got - layer) <= halves * (1 + 1e-6)).all()


def test_the_documented_bounds_are_half_the_widest_gaps():
  assert np.diff(np_levels("int8")).max() / 2 == pytest.approx(1 / 254)
  half = np.diff(quantized.LEVELS).max() / 2
  assert 0.151 < half <= 0.152


def test_representable_kernels_are_kept(format):
  generator = np.random.default_rng(1)
  kernel = generator.choice(np_levels(format), (2, 130, 5))
  kernel[:, ::64] = 1  # Each block has its absmax.
  kernel = np.float32(kernel * [1e-30, 0.3, 1, 7, 1e30])
  # The published levels and two roundings of float32.
  np.testing.assert_allclose(roundtrip(kernel, format), kernel, rtol=1e-6)


def test_quantising_again_changes_nothing(kernel, format):
  once = quantized.quantize(kernel, format)
  twice = quantized.quantize(quantized.dequantize(once, jnp.float32), format)
  jax.tree.map(np.testing.assert_array_equal, once, twice)


@pytest.mark.parametrize("format, bits", [("int8", 8.125), ("nf4", 4.5)])
def test_a_weight_takes_the_documented_bits_of_device_memory(format, bits):
  kernel = jnp.ones((3, 256, 40))
  leaves = jax.tree.leaves(quantized.quantize(kernel, format))
  on_device = sum(x.on_device_size_in_bytes() for x in leaves)
  assert 8 * on_device / kernel.size == bits


def test_layers_are_quantised_each_for_itself(kernel, format):
  together = quantized.quantize(kernel, format)
  alone = [quantized.quantize(layer, format) for layer in kernel]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
  jax.tree.map(np.testing.assert_array_equal, together, stacked)
  assert together.shape == kernel.shape
  assert alone[0].shape == kernel.shape[1:]
  weights = quantized.dequantize(together, jnp.float32)
  np.testing.assert_array_equal(
    weights[1], quantized.dequantize(alone[1], jnp.float32)
  )


@pytest.mark.parametrize("value", [0.0, 3.0, -8e37, 1.2e-38])
def test_constant_blocks_are_exact(format, value):
  kernel = np.full((64, 2), value, np.float32)
  np.testing.assert_array_equal(roundtrip(kernel, format), kernel)


def test_subnormal_blocks_become_zero(format):
  kernel = np.full((64, 2), 1e-40, np.float32)
  assert kernel.any()
  np.testing.assert_array_equal(roundtrip(kernel, format), np.zeros((64, 2)))


def test_a_block_of_zeros_stays_beside_others(kernel, format):
  kernel = kernel[0].copy()
  kernel[:64] = 0
  np.testing.assert_array_equal(roundtrip(kernel, format)[:64], 0)


@pytest.mark.parametrize("value", [1e38, -np.inf, np.nan])
def test_blocks_without_a_normal_scale_become_nan(format, value):
  kernel = np.ones((64, 2), np.float32)
  kernel[3, 0] = value
  weights = roundtrip(kernel, format)
  assert np.isnan(weights[:, 0]).all()
  np.testing.assert_array_equal(weights[:, 1], 1)


def test_other_types_are_rounded_once(kernel, format):
  half = jnp.asarray(kernel, jnp.bfloat16)
  quantised = quantized.quantize(half, format)
  wide = quantized.quantize(half.astype(jnp.float32), format)
  jax.tree.map(np.testing.assert_array_equal, quantised, wide)
  got = quantized.dequantize(quantised, jnp.bfloat16)
  expected = quantized.dequantize(quantised, jnp.float32)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, expected.astype(jnp.bfloat16))


def test_arrays_are_only_cast(kernel):
  np.testing.assert_array_equal(
    quantized.dequantize(jnp.asarray(kernel), jnp.bfloat16),
    jnp.asarray(kernel, jnp.bfloat16),
  )


@pytest.mark.parametrize(
  "kernel, format, named",
  [
    (jnp.ones((4, 4)), "int4", "'int8' or 'nf4', got 'int4'"),
    (jnp.ones(4), "int8", r"got ArrayImpl of shape \(4,\)"),
    (quantized.quantize(jnp.ones((4, 4)), "nf4"), "nf4", "got NF4 of shape"),
  ],
)
def test_bad_arguments_are_refused(kernel, format, named):
  with pytest.raises(ValueError, match=named):
    quantized.quantize(kernel, format)
