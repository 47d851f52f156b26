"""Tests of messages: supports, bytes, and what is not a message."""

import functools
import math
import struct

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fedjax_llm import compression
from fedjax_llm.compression import base, supports, wire

KEY = jax.random.key(0)
transmit = jax.jit(compression.transmit, static_argnums=0)
VECTOR = np.random.default_rng(0).normal(size=200).astype(np.float32)
quick = hypothesis.settings(deadline=None, derandomize=True)

# Bytes.


def np_decode_top_k(message):
  """The vector in a message of `top_k`, in plain Python."""
  assert message[:4] == b"FJ\x01\x01"  # Magic, version 1, a `Sparse`.
  at = 4

  def varint():
    nonlocal at
    value = shift = 0
    while True:
      at += 1
      value |= (message[at - 1] & 127) << shift
      shift += 7
      if message[at - 1] < 128:
        return value

  def array(code, width):
    nonlocal at
    assert message[at] == 128 + code
    at += 1
    size = varint()
    at += size * width
    return message[at - size * width : at]

  raw_values = array(2, 4)
  support = int.from_bytes(array(4, 1), "little")
  size = varint()
  assert at == len(message)
  values = struct.unpack(f"<{len(raw_values) // 4}f", raw_values)
  count = len(values)
  low_bits = math.floor(math.log2(size / count))
  high_nbytes = -(-(count + ((size - 1) >> low_bits)) // 8)
  low_nbytes = -(-count * low_bits // 8)
  if -(-size // 8) <= high_nbytes + low_nbytes:
    indices = [i for i in range(size) if support >> i & 1]
  else:
    marks = [i for i in range(8 * high_nbytes) if support >> i & 1]
    low = support >> 8 * high_nbytes
    indices = [
      ((mark - i) << low_bits) | low >> low_bits * i & ((1 << low_bits) - 1)
      for i, mark in enumerate(marks)
    ]
  vector = [0.0] * size
  for index, value in zip(indices, values, strict=True):
    vector[index] = value
  return vector


@pytest.mark.parametrize("density", [1 / 64, 1 / 10, 1 / 2])
def test_a_decoder_in_plain_python_agrees(density):
  sent = transmit(compression.top_k(density), VECTOR, (), KEY)
  np.testing.assert_array_equal(
    np_decode_top_k(wire.dumps(sent.payload)), sent.received
  )


@pytest.mark.parametrize(
  "dtype",
  [jnp.bfloat16, "f2", "f4", "f8", "u1", "u2", "u4", "i1", "i2", "i4"],
)
def test_arrays_of_every_type_come_back(dtype):
  array = np.arange(5).astype(dtype)
  arrived = wire.loads(wire.dumps(base.Dense(array))).values
  assert arrived.dtype == array.dtype
  np.testing.assert_array_equal(arrived, array)


def test_a_header_has_few_bytes():
  n = 10**6
  vector = jax.ShapeDtypeStruct((n,), jnp.float32)
  k = n // 16
  support = supports.nbytes(n, k)
  for compressor, data in [
    (compression.identity(), 4 * n),
    (compression.top_k(1 / 16), 4 * k + support),
    (compression.random_k(1 / 16), 4 * k + 8),
    (compression.stochastic_uniform(4), n // 2 + 4 * -(-n // 256)),
  ]:
    payload, _ = jax.eval_shape(compressor.encode, vector, (), KEY)
    assert 0 < wire.nbytes(payload) - data <= 20


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_what_is_not_finite_is_not_sent(dtype):
  array = np.array([1.0, np.nan, -np.inf], dtype)
  with pytest.raises(ValueError, match="2 of 3 values are not finite"):
    wire.dumps(base.Dense(array))
  forged = wire.dumps(base.Dense(np.zeros(3, dtype)))
  forged = forged[: -array.nbytes] + array.tobytes()
  with pytest.raises(ValueError, match="2 of 3 values are not finite"):
    wire.loads(forged)


def test_an_array_that_is_no_vector_is_refused():
  with pytest.raises(ValueError, match="one dimension"):
    wire.nbytes(base.Dense(jnp.ones((2, 3))))
  with pytest.raises(ValueError, match="one dimension"):
    wire.dumps(base.Dense(np.ones(3, np.complex64)))


# What is not a message.


@functools.cache
def messages():
  """Valid messages of every kind."""
  compressors = [
    compression.identity(),
    compression.top_k(1 / 2),
    compression.top_k(1 / 20),
    compression.random_k(0.1),
    compression.stochastic_uniform(3),
    compression.chain(
      compression.top_k(1 / 4), compression.stochastic_uniform(4)
    ),
  ]
  return [
    wire.dumps(transmit(c, VECTOR, c.init(VECTOR), KEY).payload)
    for c in compressors
  ]


def header(*digits):
  return b"FJ\x01" + bytes(digits)


HUGE = (255, 255, 255, 255, 7)  # 2**31 - 1.


@pytest.mark.parametrize(
  ("message", "complaint"),
  [
    (b"", "cut short"),
    (b"PK\x01\x00", "begins with"),
    (b"FJ\x02\x00", "version 2"),
    (header(), "cut short"),
    (header(99), "unknown tag 99"),
    (header(0, 255), "array of unknown type 127"),
    (header(0, 130, *HUGE), "cut short"),
    (header(0, 130, 255, 255, 255, 255, 8), "number that is not in"),
    (header(0, 130, 128, 128, 128, 128, 128, 0), "number that is not in"),
    (header(0, 132, 128, 0), "number that is not in"),  # Zero in two bytes.
    (header(*[0] * 10**5), "too deep"),
    (header(0, 132, 0, 7), "1 bytes follow"),
    # A `Sparse` of one value: of none, in a bitmap that marks none, two, a
    # bit beyond the end; in a support that is no array; of no value at all.
    (header(1, 132, 1, 5, 132, 0, 0), "1 values of a vector of 0"),
    (header(1, 132, 1, 5, 132, 1, 0, 3), "does not name 1 of 3"),
    (header(1, 132, 1, 5, 132, 1, 3, 3), "does not name 1 of 3"),
    (header(1, 132, 1, 5, 132, 1, 9, 3), "does not name 1 of 3"),
    (header(1, 132, 1, 5, 132, 2, 1, 0, 3), r"be uint8\[1\], got uint8\[2\]"),
    (header(1, 132, 1, 5, 0, 132, 1, 1, 3), r"be uint8\[1\], got Dense"),
    (header(1, 132, 0, 132, 1, 1, 3), "0 values of a vector of 3"),
    # A `Sparse` of `Seeded`, both as long as can be: nothing is allocated.
    (
      header(1, 2, 132, 1, 5, 134, 1, 0, 0, 0, 0, *HUGE, 132, 0, *HUGE),
      r"seed should be uint32\[2\]",
    ),
    (header(8, 132, 1, 0, 128, 0, 9, 1, 1), "codes of 9 bits"),
    (header(8, 132, 1, 0, 128, 0, 6, 1, 2), "codes should be"),
    (header(8, 132, 1, 0, 128, 0, 6, 1, 1), "scales should be"),
    (header(13, 132, 1, 0, 130, 0, 1, 1, 1), "has 1 levels"),
    (header(13, 132, 1, 0, 130, 0, 16, 1, 3), "codes should be"),
    (header(13, 132, 1, 0, 130, 0, 16, 1, 1), "scales should be"),
    # Four bits hold a code that is none of fifteen levels.
    (
      header(13, 132, 1, 15, 130, 1, *[0] * 4, 15, 1, 1),
      "codes beyond 15 levels",
    ),
    (header(14, 130, 0, 134, 2, *[0] * 8, 3, 3, 3), "each block of 3"),
    # A block that is far longer than the vector.
    (header(14, 130, 0, 134, 2, *[0] * 8, 64, 0, 1), "each block of 64"),
    (header(15, 132, 2, 255, 255, 1), "not finite"),
    (header(16, 0, 130, 0, 130, 0, 1, 1, 1), "left should be"),
    (header(15, 132, 1, 0, 1), "codes should be"),
    (header(16, 130, 0, 130, 0, 0, 1, 0), "rank 0"),
    (header(16, 130, 0, 130, 0, 1, 1, 2), "left should be"),
  ],
)
def test_what_is_not_a_message_is_refused(message, complaint):
  with pytest.raises(ValueError, match=complaint):
    wire.loads(message)


def test_a_message_that_claims_to_be_huge_allocates_nothing():
  seed = (134, 2, *[0] * 8)
  inner = (2, 132, 1, 5, *seed, *HUGE)
  payload = wire.loads(header(1, *inner, 132, 0, *HUGE))
  assert payload.size == 2**31 - 1  # For the receiver to see and to refuse.


def test_every_message_that_is_cut_short_or_goes_on_is_refused():
  for message in messages():
    for end in range(len(message)):
      with pytest.raises(ValueError):
        wire.loads(message[:end])
    with pytest.raises(ValueError, match="1 bytes follow"):
      wire.loads(message + b"\0")


def require_message_or_value_error(data):
  try:
    payload = wire.loads(data)
  except ValueError:
    return
  assert wire.dumps(payload) == data
  assert wire.nbytes(payload) == len(data)
  assert 0 <= payload.size < 2**31


@quick
@hypothesis.given(st.data())
def test_a_forged_message_is_a_message_or_a_value_error(data):
  message = bytearray(data.draw(st.sampled_from(messages())))
  # Mostly the first bytes, where the header is.
  places = st.integers(0, 12) | st.integers(-12, -1)
  for place, value in data.draw(
    st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)
  ):
    message[place] = value
  require_message_or_value_error(bytes(message))


@quick
@hypothesis.given(st.binary(max_size=40))
def test_noise_is_a_message_or_a_value_error(noise):
  require_message_or_value_error(b"FJ\x01" + noise)
