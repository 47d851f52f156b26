"""Entropy codes are as long as their papers and theory say."""

import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from fedjax_llm import compression
from fedjax_llm.compression import entropy, levels, wire

KEY = jax.random.key(0)
quick = hypothesis.settings(deadline=None, derandomize=True)


def gaussian(n):
  return np.random.default_rng(n).normal(size=n).astype(np.float32)


def payload_of(compressor, vector):
  return jax.jit(compressor.encode)(vector, compressor.init(vector), KEY)[0]


def golomb_code(indices, parameter):
  """The code as text: of each gap the quotient in unary, and the remainder."""
  code, before = "", -1
  for index in indices:
    quotient, remainder = divmod(index - before - 1, 2**parameter)
    code += "1" * quotient + "0" + f"{remainder:0{parameter + 1}b}"[1:]
    before = index
  return code


def golomb_bits(density, parameter):
  """The expected bits of a position: its remainder and its quotient."""
  return parameter + 1 / (1 - (1 - density) ** 2**parameter)


@quick
@hypothesis.given(st.integers(1, 400), st.data())
def test_golomb_codes_have_the_length_of_their_oracle(size, data):
  chosen = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
  indices, bits = sorted(chosen), 0
  # A message of all entries needs no positions.
  if len(indices) < size:
    parameter = entropy.golomb_parameter(len(indices) / size)
    bits = len(golomb_code(indices, parameter))
  assert entropy.golomb_nbytes(np.array(indices), size) == math.ceil(bits / 8)


def test_golomb_codes_are_those_of_the_paper():
  # Of 3 in 30 entries b is 3: gaps 1, 11 and 15 have quotients 0, 1 and 1.
  assert entropy.golomb_parameter(3 / 30) == 3
  bits = "0" + "001" + "10" + "011" + "10" + "111"
  assert golomb_code([1, 13, 29], 3) == bits
  assert entropy.golomb_nbytes(np.array([1, 13, 29]), 30) == 2


@pytest.mark.parametrize("density", [1 / 1000, 1 / 64, 0.1, 0.3, 0.6])
def test_golomb_codes_are_as_long_as_the_formula_says(density):
  n = 200_000
  indices = np.flatnonzero(np.random.default_rng(0).random(n) < density)
  nbits = 8 * entropy.golomb_nbytes(indices, n)
  parameter = entropy.golomb_parameter(density)
  bits = lambda parameter: golomb_bits(density, parameter)
  # A mean of 200 gaps or more, of which only the quotients vary.
  np.testing.assert_allclose(nbits / indices.size, bits(parameter), rtol=0.03)
  assert all(bits(parameter) <= bits(other) for other in range(12))
  # No code of positions is shorter than their entropy.
  least = -math.log2(density) - (1 / density - 1) * math.log2(1 - density)
  assert least <= bits(parameter) <= least + 0.25


def test_an_adaptive_code_is_its_oracle():
  codes = np.random.default_rng(1).choice(
    5, p=[0.6, 0.2, 0.1, 0.1, 0], size=300
  )
  seen, bits = [1] * 5, 0.0
  for code in codes:
    bits -= math.log2(seen[code] / sum(seen))
    seen[code] += 1
  np.testing.assert_allclose(entropy.adaptive_bits(codes, 5), bits)


@quick
@hypothesis.given(st.lists(st.integers(0, 6), min_size=1))
def test_an_adaptive_code_is_near_the_entropy(codes):
  bits = entropy.adaptive_bits(np.array(codes), 7)
  shares = np.bincount(codes) / len(codes)
  least = -len(codes) * sum(x * math.log2(x) for x in shares if x)
  table = math.log2(math.comb(len(codes) + 6, 6))
  assert least - 1e-9 <= bits <= least + table + 1e-9


def test_stc_takes_what_its_paper_says():
  n, density = 2**16, 1 / 64
  payload = payload_of(compression.stc(density), gaussian(n))
  per_entry = golomb_bits(density, entropy.golomb_parameter(density))
  # And a bit for the sign.
  expected = density * n * (per_entry + 1) / 8
  assert expected < wire.nbytes(payload)
  np.testing.assert_allclose(entropy.nbytes(payload), expected, rtol=0.03)


def test_codes_take_their_entropy():
  n = 2**14
  compressor = compression.qsgd(1, block=512)
  payload = payload_of(compressor, gaussian(n))
  assert isinstance(payload, levels.Levels)
  values = np.asarray(compressor.decode(payload))
  shares = np.unique(np.sign(values), return_counts=True)[1] / n
  least = -n / 8 * np.sum(shares * np.log2(shares)) + payload.scales.nbytes
  got = entropy.nbytes(payload)
  # Header and table are some bytes more.
  assert least <= got <= least + 20 < wire.nbytes(payload) / 3


@pytest.mark.parametrize(
  "compressor",
  [
    compression.identity(),
    compression.top_k(1.0),
    compression.top_k(0.5),
    compression.natural(),
    compression.chain(compression.top_k(0.1), compression.lloyd_max(2)),
  ],
)
def test_what_would_not_become_shorter_stays(compressor):
  payload = payload_of(compressor, gaussian(1000))
  assert entropy.nbytes(payload) <= wire.nbytes(payload)
