"""Supports come back, in the bytes that they are said to take."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from fedjax_llm.compression import supports

quick = hypothesis.settings(deadline=None, derandomize=True)
SUPPORTS = [(1, 1), (2, 1), (9, 8), (64, 16), (100, 7)]
SUPPORTS += [(1000, 1), (1000, 100), (1000, 999), (1000, 1000)]


@functools.cache
def support_programs(size, count):
  pack = jax.jit(lambda indices: supports.pack(indices, size))
  unpack = jax.jit(lambda packed: supports.unpack(packed, size, count))
  return pack, unpack


@quick
@hypothesis.given(st.sampled_from(SUPPORTS), st.data())
def test_supports_come_back(size_and_count, data):
  size, count = size_and_count
  indices = data.draw(
    st.one_of(
      st.just(range(count)),
      st.just(range(size - count, size)),
      st.permutations(range(size)).map(lambda order: sorted(order[:count])),
    )
  )
  pack, unpack = support_programs(size, count)
  packed = pack(jnp.array(indices, jnp.int32))
  assert packed.size == supports.nbytes(size, count)
  np.testing.assert_array_equal(unpack(packed), indices)


@quick
@hypothesis.given(st.integers(1, 10**7), st.data())
def test_supports_have_the_size_they_are_said_to_have(size, data):
  count = data.draw(st.integers(1, size))
  nbits = 8 * supports.nbytes(size, count)
  rounding = 2 * 7  # Elias-Fano has two parts of whole bytes.
  elias_fano = count * (2 + math.ceil(math.log2(size / count)))
  assert nbits <= min(size, elias_fano) + rounding
  # log2 of the number of supports, which no format can beat. The worst ratios
  # are 4 (0.755 bits an entry) and, where bitmaps take over, 1.
  log2_choices = sum(
    sign * math.lgamma(x + 1) / math.log(2)
    for sign, x in [(1, size), (-1, count), (-1, size - count)]
  )
  slack = math.log2(size) + rounding
  assert log2_choices - 1e-3 <= nbits <= log2_choices + count + slack
