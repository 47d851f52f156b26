import jax
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import allocation
from fedjax_llm.compression import wire

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
SIZE = 2**14
VARIANCES = np.exp(2 * RANDOM.normal(size=SIZE))
VECTOR = (np.sqrt(VARIANCES) * RANDOM.normal(size=SIZE)).astype(np.float32)
transmit = jax.jit(compression.transmit, static_argnums=0)


def water(variances, bits):
  """The least squared error of Gaussians, by the textbook: sum of min."""
  low, high = 0, variances.max()
  for _ in range(200):
    level = (low + high) / 2
    spent = np.maximum(0, np.log2(variances / level) / 2).mean()
    low, high = (level, high) if spent > bits else (low, level)
  return np.minimum(variances, level).sum()


def test_rates_are_reverse_water_filling():
  variances = np.exp(RANDOM.normal(size=1000))
  choices = np.arange(0, 6, 1 / 64)
  rates = allocation.rates(variances, 1.0, choices=choices)
  assert rates.mean() <= 1
  error = np.sum(variances / 4**rates)
  np.testing.assert_allclose(error, water(variances, 1.0), rtol=2e-3)
  assert rates.mean() > 0.98


def test_no_swap_of_rates_makes_the_error_less():
  variances = np.exp(RANDOM.normal(size=200))
  rates = allocation.rates(variances, 0.7)
  order = np.argsort(variances)
  assert (np.diff(rates[order]) >= 0).all()
  assert rates.mean() <= 0.7


def test_unbiased_everything_is_sent_and_the_error_is_the_least():
  """Against the textbook's condition: all errors have one slope in bits."""
  variances = np.exp(2 * RANDOM.normal(size=1000))
  choices = np.arange(1 / 64, 6, 1 / 64)
  rates = allocation.rates(variances, 1.0, choices=choices, unbiased=True)
  assert rates.min() > 0 and 0.98 < rates.mean() <= 1
  slopes = variances * 4**rates / (4**rates - 1) ** 2
  inside = (rates > choices[0]) & (rates < choices[-1])
  assert inside.mean() > 0.9
  spread = slopes[inside].max() / slopes[inside].min()
  # As far as steps of a 64th allow it.
  assert spread < np.max((rates[inside] + 1 / 64) / rates[inside]) ** 2
  error = lambda x: np.sum(variances / (4**x - 1))
  filled = np.maximum(
    allocation.rates(variances, 1.0, choices=(0, *choices)), 1 / 64
  )
  assert error(rates) < error(np.full(1000, rates.mean()))
  assert error(rates) < error(filled * rates.mean() / filled.mean())


def test_what_an_entry_takes_beside_its_rate_is_paid():
  rates = allocation.rates(VARIANCES, 0.5, extra=0.1)
  assert 0.45 < np.mean(rates + 0.1 * (rates > 0)) <= 0.5


@pytest.mark.parametrize("bits", [0.5, 1])
def test_errors_are_near_those_of_water_filling_and_bits_are_what_was_said(
  bits,
):
  compressor = allocation.allocated(VARIANCES, bits, memory=6)
  received, _, payload = transmit(compressor, VECTOR, (), KEY)
  taken = 8 * wire.nbytes(payload) / SIZE
  assert 0.9 * bits < taken <= bits
  bound = water(VARIANCES, taken) / VARIANCES.sum()
  error = np.sum((received - VECTOR) ** 2) / np.sum(VECTOR**2)
  assert error < 2 * bound
  # Far better than what knows nothing of the variances.
  assert error < 4.0**-bits / 2
  message = wire.dumps(payload)
  np.testing.assert_array_equal(
    received, compressor.decode(wire.loads(message))
  )


def test_unbiased_a_mean_of_many_is_nearer_than_of_the_least_error():
  """Clients that have one vector in common, and noise of their own."""
  noise = np.sqrt(VARIANCES) * RANDOM.normal(size=(48, SIZE))
  vectors = (VECTOR + noise).astype(np.float32)

  def mean(unbiased):
    code = allocation.allocated(VARIANCES, 1 / 2, memory=6, unbiased=unbiased)
    received = [transmit(code, x, (), KEY).received for x in vectors]
    payload = transmit(code, VECTOR, (), KEY).payload
    assert 8 * wire.nbytes(payload) <= SIZE / 2
    return np.mean(received, axis=0)

  # Each entry counts as much as any other.
  error = lambda x: np.mean((x - vectors.mean(axis=0)) ** 2 / VARIANCES)
  assert error(mean(True)) < 0.7 * error(mean(False))


def test_zero_arrives_as_zero_and_scale_is_the_messages_own():
  compressor = allocation.allocated(VARIANCES, 0.5, memory=6)
  zero, _, _ = transmit(compressor, 0 * VECTOR, (), KEY)
  assert not zero.any()
  one, _, _ = transmit(compressor, VECTOR, (), KEY)
  other, _, _ = transmit(compressor, 1024 * VECTOR, (), KEY)
  np.testing.assert_array_equal(1024 * one, other)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: allocation.allocated(np.zeros(9), 1), "above zero"),
    (lambda: allocation.allocated(np.ones(100), 0.5), "headers"),
    (
      lambda: allocation.allocated(VARIANCES, 0.13, unbiased=True),
      "headers",
    ),
    (
      lambda: allocation.allocated(VARIANCES, 1).encode(np.ones(3), (), KEY),
      "vector of 16384 entries",
    ),
  ],
)
def test_what_does_not_fit_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
