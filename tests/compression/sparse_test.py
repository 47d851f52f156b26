"""Tests of top-k and its kin against NumPy, and of their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import sparse, supports, wire

KEY = jax.random.key(0)
N = 300
RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=N).astype(np.float32)
CASES = {
  "normal": NORMAL,
  "few distinct magnitudes": np.round(2 * NORMAL) / 2,
  "all equal": np.where(NORMAL > 0, 1.5, -1.5).astype(np.float32),
  "mostly zero": np.where(np.arange(N) % 50 == 7, NORMAL, 0.0),
  "zeros of both signs": np.where(NORMAL > 0, 0.0, -0.0).astype(np.float32),
  "denormal": (NORMAL * 1e-40).astype(np.float32),
  "infinite": np.where(np.abs(NORMAL) > 1, np.inf * NORMAL, NORMAL),
  "increasing": np.arange(N, dtype=np.float32),
}
each_case = pytest.mark.parametrize("case", CASES)
mask_of = jax.jit(sparse.top_k_mask)  # One program for all k.
transmit = jax.jit(compression.transmit, static_argnums=0)


def np_top_k_mask(vector, k):
  """A stable sort, so that of equal magnitudes the first are chosen."""
  order = np.argsort(-np.abs(vector.astype(np.float64)), kind="stable")
  mask = np.zeros(vector.size, bool)
  mask[order[:k]] = True
  return mask


@each_case
@pytest.mark.parametrize("k", [0, 1, 2, 75, 150, 299, 300])
def test_top_k_chooses_as_a_stable_sort_does(case, k):
  vector = CASES[case]
  np.testing.assert_array_equal(mask_of(vector, k), np_top_k_mask(vector, k))


@each_case
def test_top_k_chooses_as_lax_top_k_does(case):
  if case == "denormal":
    pytest.skip("XLA:CPU takes denormals for zero in lax.top_k.")
  vector = jnp.asarray(CASES[case])
  _, indices = jax.lax.top_k(jnp.abs(vector), 75)
  np.testing.assert_array_equal(
    np.flatnonzero(mask_of(vector, 75)), np.sort(indices)
  )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_top_k_is_exact_in_every_floating_type(dtype):
  with jax.enable_x64(dtype == jnp.float64):
    # Differences that float32 would not see, and, in short types, many ties.
    vector = jnp.asarray(1 + NORMAL.astype(np.float64) * 1e-9, dtype)
    vector = jnp.where(jnp.arange(N) % 3 == 0, vector, jnp.asarray(NORMAL))
    vector = vector.astype(dtype)
    mask = mask_of(vector, 100)
  np.testing.assert_array_equal(mask, np_top_k_mask(np.asarray(vector), 100))


@pytest.mark.parametrize("n", [1, 2, 127, 128, 5000])
def test_top_k_holds_at_any_length(n):
  vector = np.round(4 * RNG.normal(size=n)).astype(np.float32)
  for k in {1, n // 2, n}:
    np.testing.assert_array_equal(mask_of(vector, k), np_top_k_mask(vector, k))


def test_every_client_may_have_its_own_traced_k():
  batch, k = np.stack(list(CASES.values())), np.arange(8) * 40
  masks = jax.jit(jax.vmap(sparse.top_k_mask))(batch, k)
  np.testing.assert_array_equal(masks, list(map(np_top_k_mask, batch, k)))


def test_top_k_never_hides_a_nan():
  vector = jnp.array([1.0, jnp.inf, -jnp.nan, 2.0])
  payload = transmit(compression.top_k(0.25), vector, (), KEY).payload
  assert np.isnan(payload.values).all()
  with pytest.raises(ValueError, match="1 of 1 values are not finite"):
    wire.dumps(payload)


def test_no_support_of_that_many_entries_loses_less_than_top_k():
  sent = transmit(compression.top_k(0.25), NORMAL, (), KEY)
  lost = np.sort(np.abs(NORMAL))[: N - N // 4]
  np.testing.assert_allclose(
    np.linalg.norm(NORMAL - sent.received), np.linalg.norm(lost), rtol=1e-6
  )


@pytest.mark.parametrize("density", [0.01, 0.25, 0.9])
@pytest.mark.parametrize("case", ["normal", "mostly zero"])
def test_top_k_loses_at_most_the_share_that_it_does_not_send(case, density):
  vector = CASES[case].astype(np.float64)
  sent = transmit(compression.top_k(density), CASES[case], (), KEY)
  lost = np.sum((vector - sent.received) ** 2)
  share = 1 - int(density * N) / N
  assert lost <= share * np.sum(vector**2)
  # Of equal magnitudes, and of none else, all of that.
  signs = np.where(vector >= 0, np.float32(1), np.float32(-1))
  sent = transmit(compression.top_k(density), signs, (), KEY)
  assert np.sum((signs - sent.received) ** 2) == N - int(density * N)


def test_top_k_is_by_index_and_not_by_threshold():
  # The tenth magnitude is 0, and every entry reaches that.
  compressor = compression.top_k(0.1)
  payload = transmit(compressor, CASES["mostly zero"], (), KEY).payload
  assert payload.values.size == 30
  indices = supports.unpack(payload.support, N, 30)
  assert np.unique(indices).size == 30


@pytest.mark.parametrize(
  ("n", "density", "k"), [(100, 0.29, 28), (10, 0.001, 1), (7, 1.0, 7)]
)
def test_k_is_the_floor_of_the_floating_product_and_at_least_one(n, density, k):
  encode = compression.top_k(density).encode
  payload, _ = jax.eval_shape(encode, jnp.ones(n), (), KEY)
  assert payload.values.size == k


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("case", ["normal", "zeros of both signs", "denormal"])
def test_density_one_keeps_every_bit(case, dtype):
  with jax.enable_x64(dtype == jnp.float64):
    vector = jnp.asarray(CASES[case], dtype)
    sent = transmit(compression.top_k(1.0), vector, (), KEY)
  assert sent.received.dtype == dtype
  assert np.asarray(sent.received).tobytes() == np.asarray(vector).tobytes()


def test_top_k_keeps_the_values_it_keeps_bit_for_bit():
  with jax.enable_x64(True):
    vector = jnp.asarray(NORMAL.astype(float) / 3)
    sent = transmit(compression.top_k(0.25), vector, (), KEY)
  expected = np.where(np_top_k_mask(NORMAL, 75), NORMAL.astype(float) / 3, 0)
  np.testing.assert_array_equal(sent.received, expected)


def test_random_k_is_unbiased():
  vector, draws = np.array([1.0, -2.0, 0.0, 4.0, 8.0], np.float32), 4000
  compressor = compression.random_k(0.4)  # Two of five.
  many = jax.vmap(lambda key: transmit(compressor, vector, (), key).received)
  received = np.asarray(many(jax.random.split(KEY, draws)))
  assert (np.count_nonzero(received, axis=1) <= 2).all()
  # An entry x is 2.5 x with chance 0.4: its variance is x^2 (n / k - 1).
  deviation = np.abs(vector) * np.sqrt(1.5 / draws)
  assert (np.abs(received.mean(0) - vector) <= 5 * deviation).all()


def test_random_k_sends_eight_bytes_for_its_support():
  encode = compression.random_k(0.5).encode
  payload, _ = jax.eval_shape(encode, NORMAL, (), KEY)
  assert payload.seed.size * payload.seed.dtype.itemsize == 8
  assert wire.nbytes(payload) <= 4 * 150 + 8 + 16


def test_a_seed_draws_the_same_entries_whatever_the_receiver_has_set():
  compressor = compression.random_k(0.5)
  payload = jax.device_get(transmit(compressor, NORMAL, (), KEY).payload)
  received = [jax.jit(compressor.decode)(payload)]
  with jax.enable_x64(True), jax.default_prng_impl("rbg"):
    received.append(jax.jit(compressor.decode)(payload))
  np.testing.assert_array_equal(*received)


def test_biased_random_k_keeps_values_as_they_are():
  compressor = compression.random_k(0.5, unbiased=False)
  received = transmit(compressor, NORMAL, (), KEY).received
  is_kept = np.asarray(received) != 0
  assert is_kept.sum() == 150
  np.testing.assert_array_equal(received[is_kept], NORMAL[is_kept])


def test_select_sends_the_entries_of_its_mask_and_no_support():
  mask = NORMAL > 1
  sent = transmit(compression.select(mask), NORMAL, (), KEY)
  np.testing.assert_array_equal(sent.received, np.where(mask, NORMAL, 0))
  np.testing.assert_array_equal(sent.payload.values, NORMAL[mask])


def test_select_takes_a_traced_mask_if_it_is_told_the_count():
  @jax.jit
  def send(mask):
    compressor = compression.select(mask, count=75)
    return compression.transmit(compressor, jnp.asarray(NORMAL), (), KEY)

  for k in (60, 75):
    mask = np_top_k_mask(NORMAL, k)
    np.testing.assert_array_equal(
      send(mask).received, np.where(mask, NORMAL, 0)
    )


def test_select_refuses_what_would_lose_entries():
  with pytest.raises(ValueError, match="needs `count`"):
    jax.jit(lambda mask: compression.select(mask).init(mask))(NORMAL > 0)
  with pytest.raises(
    ValueError, match="at least 2, the entries in its mask, got count=1"
  ):
    compression.select(np.array([True, True, False]), count=1)
  with pytest.raises(ValueError, match="3 entries, got .* Its mask"):
    compression.select(np.ones(3, bool)).encode(NORMAL, (), KEY)


@pytest.mark.parametrize("density", [0, -0.5, 1.5, float("nan")])
def test_a_density_outside_its_range_is_refused(density):
  with pytest.raises(ValueError, match="top_k expected density in"):
    compression.top_k(density)
  with pytest.raises(ValueError, match="random_k expected density in"):
    compression.random_k(density)
