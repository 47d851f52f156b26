"""Tests of what is built of compressors: chains and error feedback."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import base, wire

KEY = jax.random.key(0)
transmit = jax.jit(compression.transmit, static_argnums=0)


def test_the_program_in_the_docstring_prints_what_it_says():
  results = doctest.testmod(base)
  assert results.attempted and not results.failed


def test_identity_keeps_every_bit_also_of_float64():
  with jax.enable_x64(True):
    vector = jnp.array([1 / 3, -0.0, 1e300, 5e-324])
    sent = transmit(compression.identity(), vector, (), KEY)
    arrived = wire.loads(wire.dumps(sent.payload)).values
  assert sent.received.dtype == np.float64
  assert np.asarray(sent.received).tobytes() == np.asarray(vector).tobytes()
  assert arrived.tobytes() == np.asarray(vector).tobytes()


def test_transmit_returns_the_payload_of_what_arrives():
  compressor = compression.cast(jnp.bfloat16)
  vector = jnp.array([1.0, 1 / 3])
  received, state, payload = transmit(compressor, vector, (), KEY)
  assert state == ()
  np.testing.assert_array_equal(
    received, compressor.decode(payload).astype(vector.dtype)
  )


def test_a_compressor_is_stateless_if_its_state_has_no_leaves():
  vector = jnp.ones(8)
  chained = compression.chain(
    compression.top_k(0.5), compression.stochastic_uniform(4)
  )
  assert not jax.tree.leaves(chained.init(vector))
  assert jax.tree.leaves(compression.error_feedback(chained).init(vector))


def test_a_chain_of_one_is_that_one():
  compressor = compression.top_k(0.5)
  assert compression.chain(compressor) is compressor


def test_a_chain_sends_the_support_and_the_compressed_values():
  chained = compression.chain(
    compression.top_k(0.5), compression.stochastic_uniform(4)
  )
  vector = jnp.arange(8.0)
  received, _, payload = transmit(chained, vector, chained.init(vector), KEY)
  assert payload.values.codes.nbytes == 2  # Four codes of four bits.
  assert payload.support.nbytes == 1  # Eight entries.
  np.testing.assert_array_equal(received[:4], 0)
  assert received[7] == 7  # The largest of a block is a level.


@pytest.mark.parametrize("jit", [False, True])
def test_a_chain_in_the_wrong_order_is_an_error_that_names_the_offender(jit):
  chained = compression.chain(
    compression.top_k(0.5),
    compression.stochastic_uniform(4),
    compression.top_k(0.5),
  )
  init = jax.jit(chained.init) if jit else chained.init
  with pytest.raises(ValueError, match="cannot compress a Levels further"):
    init(jnp.ones(8))


@pytest.mark.parametrize(
  "compressor",
  [
    compression.top_k(0.1),
    compression.random_k(0.3, unbiased=False),
    compression.cast(jnp.bfloat16),
    compression.chain(
      compression.top_k(0.5), compression.stochastic_uniform(4)
    ),
  ],
)
def test_error_feedback_loses_nothing_in_the_long_run(compressor):
  sent = jax.random.normal(KEY, (20, 50))
  compressor = compression.error_feedback(compressor)

  def step(state, vector):
    result = compression.transmit(compressor, vector, state, KEY)
    return result.state, result.received

  state, received = jax.lax.scan(step, compressor.init(sent[0]), sent)
  residual, _ = state
  # Twenty sums of numbers below 2**5 in float32, each off by 2**-19 at most.
  np.testing.assert_allclose(
    received.sum(0) + residual, sent.sum(0), rtol=0, atol=20 * 2.0**-19
  )


@pytest.mark.parametrize(
  "compressor",
  [
    compression.top_k(0.1),
    compression.random_k(0.3, unbiased=False),
    # Some are never sent.
    compression.select(np.arange(50) % 10 < 5),
  ],
)
def test_of_whole_numbers_the_feedback_is_exact(compressor):
  sent = jax.random.randint(KEY, (20, 50), -1000, 1000).astype(jnp.float32)
  compressor = compression.error_feedback(compressor)
  state, received = compressor.init(sent[0]), 0.0
  for vector in sent:
    message = transmit(compressor, vector, state, KEY)
    state, received = message.state, received + message.received
  np.testing.assert_array_equal(received + state[0], sent.sum(0))


def changing(n):
  """Sends entries that both ends know, others in every message."""

  def encode(vector, key):
    mask = jax.random.permutation(key, n) < n // 2
    return compression.select(mask, n // 2).encode(vector, (), key)[0]

  return base.stateless(encode, lambda payload: payload.values)


FEEDBACK = compression.error_feedback(compression.cast(jnp.bfloat16))


@pytest.mark.parametrize(
  ("first", "name"),
  [
    (compression.top_k(0.5), "Sparse"),
    (compression.random_k(0.5), "Seeded"),
    (compression.rotate(block=8), "Rotated"),
    (compression.top_k_per_group(np.arange(8) % 2, 0.5), "Sparse"),
    (compression.relative_to(jnp.ones(8), compression.top_k(0.5)), "Sparse"),
    (changing(8), "Masked"),
  ],
)
@pytest.mark.parametrize("rest", [FEEDBACK, compression.power_sgd(1)])
def test_a_memory_by_position_needs_positions_that_stay(first, name, rest):
  message = rf"without memory after a {name}.*error_feedback\(chain\("
  for chained in (
    compression.chain(first, rest),
    compression.chain(compression.identity(), first, rest),
  ):
    with pytest.raises(ValueError, match=message):
      chained.init(jnp.ones(8))


def test_a_memory_after_a_fixed_selection_stays_with_its_entries():
  mask = np.arange(50) % 3 == 0
  compressor = compression.chain(compression.select(mask), FEEDBACK)
  sent = jax.random.normal(KEY, (20, 50))
  state, received = compressor.init(sent[0]), 0.0
  for vector in sent:
    message = transmit(compressor, vector, state, KEY)
    state, received = message.state, received + message.received
  residual = state[1][0]
  # As above: twenty sums, each off by 2**-19 at most.
  np.testing.assert_allclose(
    received[mask] + residual, sent.sum(0)[mask], rtol=0, atol=20 * 2.0**-19
  )
  np.testing.assert_array_equal(received[~mask], 0)


def test_a_chain_that_begins_with_a_chain_is_refused_in_words():
  inner = compression.chain(
    compression.select(np.ones(8, bool)), compression.top_k(0.5)
  )
  with pytest.raises(ValueError, match="Dense of a Sparse.*one chain"):
    compression.chain(inner, compression.sign()).init(jnp.ones(8))


@pytest.mark.parametrize(
  ("compressor", "expected"),
  [
    (compression.identity(), False),
    (compression.stc(0.5), False),
    # Its memory is where to start from, no part of what it lost.
    (compression.power_sgd(1), False),
    (FEEDBACK, True),
    (compression.ef_sign_sgd(), True),
    (compression.deep_gradient_compression(0.5), True),
    (compression.error_feedback(compression.power_sgd(1)), True),
    (compression.relative_to(jnp.ones(8), FEEDBACK), True),
    (compression.chain(compression.identity(), FEEDBACK), True),
    (compression.chain(FEEDBACK, compression.cast(jnp.float16)), True),
  ],
)
def test_what_delays_what_it_loses_is_for_updates(compressor, expected):
  assert compressor.for_updates is expected


def test_what_both_ends_know_is_not_sent():
  known = jnp.array([5.0, -3.0, 2.0, 1.0])
  compressor = compression.relative_to(known, compression.top_k(0.25))
  moved = known.at[3].add(0.5)
  payload, _ = compressor.encode(moved, compressor.init(moved), KEY)
  np.testing.assert_array_equal(payload.values, [0.5])
  np.testing.assert_array_equal(compressor.decode(payload), moved)
