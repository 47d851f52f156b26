"""The laws of count sketches, and an oracle in plain loops."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import sketch, wire

KEY = jax.random.key(0)
ROWS, COLUMNS, SIZE = 5, 64, 1000
transmit = jax.jit(compression.transmit, static_argnums=0)
estimates = jax.jit(sketch.estimates)


@functools.cache
def made(seed=0, **knobs):
  return compression.count_sketch(ROWS, COLUMNS, seed=seed, **knobs)


def gaussian(seed=1, size=SIZE):
  return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def encode(vector, seed=0):
  return transmit(made(seed), vector, (), KEY).payload


def hashes(seed, size=SIZE, columns=COLUMNS):
  """The column and sign of every entry in every row, on the host."""
  each = [sketch.hashes(seed, row, size, columns) for row in range(ROWS)]
  return [np.array(x, np.int64) for x in zip(*each, strict=True)]


@pytest.mark.parametrize("size", [7, 64, SIZE])
def test_a_sketch_is_its_oracle(size):
  columns, signs = hashes(seed=3, size=size)
  vector = gaussian(size=size)
  table = np.zeros((ROWS, COLUMNS))
  for row in range(ROWS):
    for entry in range(size):
      table[row, columns[row, entry]] += signs[row, entry] * vector[entry]
  sent = transmit(made(3), vector, (), KEY)
  got = np.reshape(sent.payload.values, table.shape)
  np.testing.assert_allclose(got, table, rtol=1e-5, atol=1e-5)
  expected = [
    sorted(signs[row, i] * table[row, columns[row, i]] for row in range(ROWS))[
      ROWS // 2
    ]
    for i in range(size)
  ]
  np.testing.assert_allclose(sent.received, expected, rtol=1e-5, atol=1e-5)


def test_the_sketch_of_a_sum_is_the_sum_of_sketches():
  x, y = gaussian(1), gaussian(2)
  added = encode(x).values - 0.5 * encode(y).values
  np.testing.assert_allclose(
    encode(x - 0.5 * y).values, added, rtol=1e-5, atol=1e-5
  )


@functools.cache
def draws(count=400):
  """The columns and signs of every entry in one row, by many seeds."""
  draw = jax.vmap(lambda seed: sketch.hashes(seed, 0, SIZE, COLUMNS))
  columns, signs = jax.jit(draw)(np.arange(count))
  return np.asarray(columns), np.asarray(signs, np.float32)


def test_hashes_are_what_the_laws_ask_for():
  left, right = np.array([(0, 1), (0, 64), (3, 999), (70, 800), (130, 70)]).T
  columns, signs = draws()
  meet = np.mean(columns[:, left] == columns[:, right], axis=0)
  # Five standard deviations of a mean of so many.
  chance, count = 1 / COLUMNS, len(columns)
  assert (meet <= chance + 5 * np.sqrt(chance / count)).all()
  product = np.mean(signs[:, left] * signs[:, right], axis=0)
  assert (abs(product) <= 5 / np.sqrt(count)).all()
  assert (columns.max(), columns.min()) == (COLUMNS - 1, 0)
  rows, _ = hashes(seed=0)
  shared = [np.mean(rows[i] == rows[j]) for i in range(ROWS) for j in range(i)]
  assert max(shared) < 0.2


def test_each_row_is_unbiased_within_the_variance():
  vector = gaussian()
  columns, signs = draws()
  table = np.zeros((len(columns), COLUMNS))
  seeds = np.arange(len(columns))[:, None]
  np.add.at(table, (seeds, columns), signs * vector[None])
  error = signs * table[seeds, columns] - vector[None]
  # The mean square is of 400,000 errors, of which 1,000 share a table.
  variance = np.mean(error**2)
  assert variance <= 1.1 * np.sum(vector**2) / COLUMNS
  mean = np.mean(error, axis=0)
  assert (abs(mean) <= 5 * np.sqrt(variance / len(columns))).all()


def test_the_median_is_seldom_off_by_more_than_its_bound():
  vector = gaussian()
  bound = np.sqrt(8 / COLUMNS) * np.linalg.norm(vector)
  off = [
    np.abs(transmit(made(seed), vector, (), KEY).received - vector) > bound
    for seed in range(5)
  ]
  assert np.mean(off) <= 2 ** (-ROWS / 2)


def test_heavy_hitters_are_found():
  # The bound is 1.5: none of the rest comes near to what is left of these.
  vector = gaussian(size=20_000) / 100
  heavy = np.array([5, 17, 5005, 5006, 19_998])
  vector[heavy] = np.float32([5, -6, 7, -8, 9])
  compressor = compression.count_sketch(
    ROWS, 1024, density=heavy.size / vector.size
  )
  received = transmit(compressor, vector, (), KEY).received
  np.testing.assert_array_equal(np.flatnonzero(received), heavy)
  bound = np.sqrt(8 / 1024) * np.linalg.norm(vector)
  assert np.max(np.abs(received[heavy] - vector[heavy])) <= bound < 1.5


@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_the_median_is_that_of_numpy(rows):
  compressor = compression.count_sketch(rows, 16)
  sent = transmit(compressor, gaussian(size=100), (), KEY)
  expected = np.median(estimates(sent.payload), axis=0)
  np.testing.assert_allclose(sent.received, expected, rtol=1e-6)


def test_one_that_is_wide_enough_is_exact():
  vector = gaussian(size=COLUMNS)
  received = transmit(made(), vector, (), KEY).received
  np.testing.assert_array_equal(received, vector)


def test_another_seed_is_another_sketch_and_travels():
  payloads = [encode(gaussian(), seed) for seed in (0, 2**31 - 1)]
  assert np.any(payloads[0].values != payloads[1].values)
  arrived = wire.loads(wire.dumps(payloads[1]))
  # The receiver has another seed of its own, which is not used.
  received = [jax.jit(made().decode)(x) for x in (arrived, payloads[1])]
  np.testing.assert_array_equal(*received)


def test_a_message_whose_rows_are_not_of_one_length_is_refused():
  payload = jax.device_get(encode(gaussian()))
  for broken in (
    dataclasses.replace(payload, rows=3),
    dataclasses.replace(payload, rows=0),
    dataclasses.replace(payload, size=0),
  ):
    with pytest.raises(ValueError, match=f"320 values in {broken.rows} rows"):
      wire.loads(wire.dumps(broken))


@pytest.mark.parametrize(
  ("rows", "columns", "knobs", "message"),
  [
    (0, 1, {}, "rows=0"),
    (1, 0, {}, "columns=0"),
    (1, 1, {"seed": -1}, "seed=-1"),
    (1, 1, {"seed": 2**31}, "seed=2147483648"),
    (1, 1, {"density": 0.0}, "density=0.0"),
  ],
)
def test_what_is_out_of_range_is_refused(rows, columns, knobs, message):
  with pytest.raises(ValueError, match=message):
    compression.count_sketch(rows, columns, **knobs)
