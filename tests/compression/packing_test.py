import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.compression import packing


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 13, 32])
def test_codes_are_packed_without_gaps_and_come_back(bits):
  codes = np.random.default_rng(bits).integers(0, 2**bits, 37, np.uint32)
  packed = packing.pack_bits(jnp.asarray(codes), bits)
  assert packed.dtype == jnp.uint8 and packed.size == -(-37 * bits // 8)
  stream = sum(int(code) << bits * i for i, code in enumerate(codes))
  assert bytes(packed) == stream.to_bytes(packed.size, "little")
  np.testing.assert_array_equal(packing.unpack_bits(packed, 37, bits), codes)


@pytest.mark.parametrize(
  ("base", "bits"), [(2, 1), (3, 8 / 5), (4, 2), (5, 8 / 3), (9, 4), (256, 8)]
)
def test_digits_take_the_fewest_bits_and_come_back(base, bits):
  codes = np.random.default_rng(base).integers(0, base, 120, np.uint32)
  packed = packing.pack_digits(jnp.asarray(codes), base)
  assert packed.dtype == jnp.uint8
  assert packed.size == packing.digits_nbytes(120, base) == 120 * bits / 8
  np.testing.assert_array_equal(packing.unpack_digits(packed, 120, base), codes)


def test_five_ternary_digits_are_a_byte_the_first_one_lowest():
  packed = packing.pack_digits(jnp.array([2, 0, 1, 0, 0, 1, 2]), 3)
  assert bytes(packed) == bytes([2 + 9, 1 + 2 * 3])
