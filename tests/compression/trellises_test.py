import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import trellises, wire

KEY = jax.random.key(0)
transmit = jax.jit(compression.transmit, static_argnums=0)


def gaussian(n):
  return np.random.default_rng(n).normal(size=n).astype(np.float32)


def sent(compressor, vector):
  message = transmit(compressor, vector, (), KEY)
  error = np.sum(np.square(message.received - vector)) / np.sum(vector**2)
  return error, message.payload


def read_by_hand(symbols, memory, shift, table):
  """What a stream of symbols stands for, one after the other."""
  state, values = 0, []
  for symbol in symbols:
    state = (state * 2**shift + symbol) % 2**memory
    values.append(table[state])
  return np.array(values).ravel()


@pytest.mark.parametrize(
  ("bits", "n", "memory"),
  [(1, 8, 3), (1 / 2, 16, 4), (2, 4, 3), (1 / 3, 20, 4)],
)
@pytest.mark.parametrize("has_profile", [False, True])
def test_no_other_stream_comes_nearer(bits, n, memory, has_profile):
  vector = gaussian(n)
  profile = np.linspace(0.2, 3, n, dtype=np.float32) if has_profile else None
  known = np.ones(n) if profile is None else profile / profile.max()
  compressor = compression.trellis(bits, memory=memory, profile=profile)
  _, payload = sent(compressor, vector)
  table = trellises.table(memory, payload.entries).astype(np.float64)
  unit = np.sqrt((vector**2).sum() / (known**2).sum() * (1 - 4.0**-bits))

  def error(symbols):
    values = read_by_hand(symbols, memory, payload.bits, table)[:n] * known
    return np.sum((vector - unit * values) ** 2)

  steps = -(-n // payload.entries)
  every = itertools.product(range(2**payload.bits), repeat=steps)
  stream = np.unpackbits(np.asarray(payload.codes), bitorder="little")
  stream = stream[: steps * payload.bits].reshape(steps, -1)
  chosen = stream @ 2 ** np.arange(payload.bits)
  assert error(chosen) <= min(map(error, every)) * (1 + 1e-5)
  # And what arrives is what this stream stands for, at the best scale.
  values = read_by_hand(chosen, memory, payload.bits, table)[:n] * known
  scale = values @ vector / (values @ values)
  received = transmit(compressor, vector, (), KEY).received
  np.testing.assert_allclose(received, scale * values, rtol=5e-3, atol=1e-6)


# Decibels above 4**-bits, of Gaussian vectors; the bound is zero.
@pytest.mark.parametrize(
  ("bits", "gap"), [(1 / 4, 0.35), (1 / 2, 0.5), (1, 0.9), (2, 1.7)]
)
def test_errors_are_near_the_rate_distortion_bound(bits, gap):
  error, payload = sent(compression.trellis(bits, memory=8), gaussian(2**14))
  assert 8 * wire.nbytes(payload) / 2**14 <= bits + 0.02
  assert 0 < 10 * np.log10(error * 4**bits) < gap


def test_more_memory_has_less_error():
  errors = [
    sent(compression.trellis(1, memory=memory), gaussian(2**12))[0]
    for memory in (3, 6, 9)
  ]
  assert errors == sorted(errors, reverse=True)


def test_a_profile_puts_bits_where_they_count():
  profile = np.exp(gaussian(2**12))
  vector = profile * np.roll(gaussian(2**12), 1)
  blind, _ = sent(compression.trellis(1, memory=8), vector)
  seeing, _ = sent(compression.trellis(1, memory=8, profile=profile), vector)
  # A share of each entry's variance, as if each were sent by itself.
  assert seeing < 4**-1 * 10**0.07 < blind


@pytest.mark.parametrize("bits", [1 / 4, 1 / 2, 2])
def test_unbiased_the_mean_over_rotations_comes_near_the_vector(bits):
  vector, count = gaussian(2**11), 64
  keys = jax.random.split(KEY, count)

  def received(unbiased):
    code = compression.trellis(bits, memory=8, unbiased=unbiased)
    code = compression.chain(compression.rotate(), code)
    return np.stack(
      [transmit(code, vector, code.init(vector), x).received for x in keys]
    )

  def error(received):
    return np.sum((received - vector) ** 2, axis=-1) / np.sum(vector**2)

  least = received(unbiased=False)
  one = error(least).mean()
  # What is left out of each is left out of their mean.
  assert error(least.mean(axis=0)) > 0.9 * one**2
  unbiased = received(unbiased=True)
  assert error(unbiased).mean() < 1.05 * one / (1 - one)
  assert error(unbiased.mean(axis=0)) < 1.2 * one / (1 - one) / count


def test_unbiased_no_block_is_blown_up():
  """A last block of few entries, of which an eighth of a bit tells nothing."""
  code = compression.trellis(1 / 8, memory=8, block=2048, unbiased=True)
  for seed in range(50):
    vector = np.random.default_rng(seed).normal(size=2051).astype(np.float32)
    received = transmit(code, vector, (), KEY).received
    assert np.abs(received[2048:]).max() < 20 * np.abs(vector[2048:]).max()
  zero = transmit(code, np.zeros(2051, np.float32), (), KEY).received
  assert not zero.any()


def test_blocks_have_scales_of_their_own():
  vector = gaussian(3000) * np.repeat(np.float32([1e-30, 1, 1e30]), 1000)
  compressor = compression.trellis(1, memory=8, block=1000)
  received = transmit(compressor, vector, (), KEY).received
  for part in (slice(1000), slice(1000, 2000), slice(2000, None)):
    unit = np.abs(vector[part]).max()
    exact, arrived = vector[part] / unit, received[part] / unit
    assert np.sum((arrived - exact) ** 2) < 0.35 * np.sum(exact**2)


def test_a_search_in_groups_is_that_of_all_at_once(monkeypatch):
  vector = gaussian(1100)
  compressor = compression.trellis(1, memory=6, block=100)
  together = jax.jit(compressor.encode)(vector, (), KEY)[0]
  monkeypatch.setattr(trellises, "_CHOICES", 3 * 100 * 32)
  compressor = compression.trellis(1, memory=6, block=100)  # Compiled anew.
  apart = jax.jit(compressor.encode)(vector, (), KEY)[0]
  np.testing.assert_array_equal(together.codes, apart.codes)


def test_a_table_is_of_opposites_and_of_unit_variance():
  table = trellises.table(8, 3)
  np.testing.assert_array_equal(table[::2], -table[1::2])
  np.testing.assert_allclose(np.mean(table**2, axis=0), 1, rtol=1e-6)
  off_diagonal = np.corrcoef(table.T) - np.eye(3)
  assert np.abs(off_diagonal).max() < 3 / np.sqrt(len(table) / 2)


def test_of_nothing_nothing_arrives():
  message = transmit(compression.trellis(1), jnp.zeros(0), (), KEY)
  assert message.received.shape == (0,)
  again = wire.loads(wire.dumps(jax.device_get(message.payload)))
  assert again.size == 0


@pytest.mark.parametrize(
  "forged",
  [
    {"bits": 0},
    {"bits": 9, "memory": 12},
    {"memory": 17},
    {"memory": 0},
    {"entries": 0},
    {"entries": 9},
    {"block": 0},
    {"block": 31},
    {"block": 2**26},
    {"size": 200},
    {"size": 0},
  ],
)
def test_fields_that_do_not_fit_are_refused(forged):
  _, payload = sent(
    compression.trellis(1 / 2, memory=4, block=30), gaussian(60)
  )
  payload = jax.tree.map(np.asarray, payload)
  with pytest.raises(ValueError, match="The message"):
    wire.loads(wire.dumps(dataclasses.replace(payload, **forged)))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: compression.trellis(0), "got bits=0"),
    (lambda: compression.trellis(0.3), "got bits=0.3"),
    (lambda: compression.trellis(9), "got bits=9"),
    (lambda: compression.trellis(1, memory=17), "memory=17"),
    (lambda: compression.trellis(2, memory=1), "memory=1"),
    (lambda: compression.trellis(1, block=0), "block=0"),
    (lambda: compression.trellis(1, profile=np.zeros(4)), r"in \[0.0, 0.0\]"),
    (lambda: compression.trellis(1, profile=np.full(4, np.nan)), "finite"),
    (lambda: compression.trellis(1, profile=np.ones((2, 2))), "1-D profile"),
    (
      lambda: sent(compression.trellis(1, profile=jnp.ones(4)), gaussian(5)),
      "vector of 4 entries.*got 5",
    ),
  ],
)
def test_what_is_out_of_range_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
