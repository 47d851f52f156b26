"""Tests of Top-K by segment, by group and of whole groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import grouped, sparse, supports, wire

KEY = jax.random.key(0)
# Two rows of groups, of three entries each and of two, and two free entries.
OWNERS = np.array([0, 1, 2, 0, -1, 1, 2, 0, 1, 2, 3, 4, 5, 6, -1, 3, 4, 5, 6])
SIZES, COUNTS = (3, 4), (1, 2)


def send(compressor, vector):
  state = compressor.init(vector)
  transmit = jax.jit(functools.partial(compression.transmit, compressor))
  return transmit(jnp.asarray(vector), state, KEY)


def test_each_segment_keeps_its_own_largest_entries():
  rng = np.random.default_rng(0)
  # Two equal segments, which are one program, an empty one, a smaller one.
  sizes, densities = (20, 20, 0, 7), (0.3, 0.3, 0.5, 0.29)
  vector = rng.normal(size=47).astype(np.float32)
  vector[:20] *= 1000
  expected, start = np.zeros_like(vector), 0
  for size, count in zip(sizes, (6, 6, 0, 2), strict=True):
    part = vector[start : start + size]
    kept = start + np.argsort(-abs(part), kind="stable")[:count]
    expected[kept] = vector[kept]
    start += size
  message = send(grouped.top_k_per_segment(sizes, densities), vector)
  np.testing.assert_array_equal(message.received, expected)
  assert wire.entries(message.payload) == 14


def test_one_segment_is_top_k_to_the_byte():
  vector = np.random.default_rng(1).normal(size=100).astype(np.float32)
  got = send(grouped.top_k_per_segment([100], [0.29]), vector).payload
  expected = send(sparse.top_k(0.29), vector).payload
  assert wire.dumps(got) == wire.dumps(expected)


def test_a_support_that_only_the_sender_knows_travels():
  vector = np.arange(1, 65, dtype=np.float32)
  mask = np.arange(64) % 16 == 3
  message = send(grouped.send_mask(mask, 4), vector)
  np.testing.assert_array_equal(message.received, np.where(mask, vector, 0))
  assert message.payload.support.size == supports.nbytes(64, 4)


def test_what_is_kept_is_scaled_to_the_magnitudes_of_the_whole():
  whole = np.array([1, -3, 2, 2, 5, 0, 0], np.float32)
  kept = np.array([0, -3, 2, 0, 0, 0, 0], np.float32)
  got = grouped.rescale_each(kept, whole, (2, 2, 1, 0, 2))
  np.testing.assert_allclose(got, [0, -4, 4, 0, 0, 0, 0])


@pytest.mark.parametrize("densities", [(0.5,), (0.5, 0.0), (0.5, 1.5)])
def test_densities_that_do_not_fit_are_refused(densities):
  with pytest.raises(ValueError, match="for each segment"):
    grouped.top_k_per_segment((4, 4), densities)


def test_a_vector_of_another_length_is_refused():
  with pytest.raises(ValueError, match="expected a vector of 8 entries"):
    send(grouped.top_k_per_segment((4, 4), (0.5, 0.5)), np.zeros(9, np.float32))


def test_each_group_keeps_its_own_largest_entries():
  rng = np.random.default_rng(3)
  owners = rng.integers(0, 3, 100)
  vector = np.where(owners == 1, 1e-6, 1.0) * rng.normal(size=100)
  vector = np.where(owners == 2, 0, vector).astype(np.float32)
  compressor = compression.top_k_per_group(owners, 0.25)
  payload, _ = jax.jit(compressor.encode)(vector, (), KEY)
  held = np.asarray(sparse.support(payload))
  for group in range(3):
    own = np.flatnonzero(owners == group)
    largest = sorted(own, key=lambda i: (-abs(vector[i]), i))
    # Zeros of one group are never taken for those of another.
    assert set(largest[: len(own) // 4]) == set(own[held[own]])
  np.testing.assert_array_equal(
    compressor.decode(payload), np.where(held, vector, 0)
  )


def test_owners_of_another_vector_are_refused():
  compressor = compression.top_k_per_group(np.arange(4) % 2, 0.5)
  with pytest.raises(ValueError, match="expected a vector of 4 entries"):
    compressor.encode(jnp.ones(5), (), KEY)
  with pytest.raises(ValueError, match="a density in"):
    compression.top_k_per_group(np.arange(4) % 2, 0.0)


def vector():
  return np.random.default_rng(2).normal(size=19).astype(np.float32)


def send_groups(sent, owners=OWNERS, sizes=SIZES, counts=COUNTS):
  compressor = grouped.top_k_groups(owners, sizes, counts)
  transmit = jax.jit(lambda x: compression.transmit(compressor, x, (), KEY))
  return transmit(sent)


def largest(sent):
  """The entries of the groups with the largest norms, group by group."""
  norms = [np.linalg.norm(sent[OWNERS == group]) for group in range(7)]
  kept = [-1, np.argmax(norms[:3]), *(3 + np.argsort(norms[3:])[-2:])]
  return np.isin(OWNERS, kept)


def test_the_groups_of_the_largest_norms_are_sent_whole():
  sent = vector()
  message = send_groups(sent)
  kept = largest(sent)
  np.testing.assert_array_equal(message.received, np.where(kept, sent, 0))
  np.testing.assert_array_equal(grouped.support(message.payload, OWNERS), kept)
  # Three entries of a group, two each of two groups, and two of none.
  assert wire.entries(message.payload) == 3 + 4 + 2


def test_a_choice_of_groups_takes_a_byte_not_one_an_entry():
  message = wire.dumps(send_groups(vector()).payload)
  assert 4 * 9 + 1 < len(message) < 4 * 9 + 1 + 16
  arrived = wire.loads(message)
  assert wire.dumps(arrived) == message
  got = grouped.top_k_groups(OWNERS, SIZES, COUNTS).decode(arrived)
  np.testing.assert_array_equal(got, send_groups(vector()).received)


def test_all_groups_are_the_vector_and_need_no_names():
  message = send_groups(vector(), counts=SIZES)
  np.testing.assert_array_equal(message.received, vector())
  assert not message.payload.support.size


def test_the_values_of_groups_can_be_compressed_further():
  compressor = compression.chain(
    grouped.top_k_groups(OWNERS, SIZES, COUNTS),
    compression.stochastic_uniform(8),
  )
  sent = jnp.asarray(vector())
  state = compressor.init(sent)
  message = jax.jit(lambda x: compression.transmit(compressor, x, state, KEY))(
    sent
  )
  # A level of eight bits is less than a hundredth of the largest.
  expected = np.where(largest(vector()), vector(), 0)
  bound = abs(vector()).max() / 100
  np.testing.assert_allclose(message.received, expected, atol=bound)
  assert wire.entries(message.payload) == 9


def test_groups_under_vmap_are_sent_as_alone():
  sent = np.stack([vector(), -3 * vector()[::-1]])
  together = jax.vmap(lambda x: send_groups(x).received)(sent)
  alone = [send_groups(x).received for x in sent]
  np.testing.assert_array_equal(together, alone)


def test_a_message_that_names_too_few_groups_is_refused():
  payload = send_groups(vector()).payload
  forged = grouped.Grouped(payload.values, payload.support, 7, 2, 19)
  with pytest.raises(ValueError, match="support"):
    wire.loads(wire.dumps(forged))


@pytest.mark.parametrize(
  ("values", "size"), [(np.zeros(2, np.float32), 19), (np.zeros(9), 8)]
)
def test_a_message_of_too_few_or_too_many_values_is_refused(values, size):
  support = send_groups(vector()).payload.support
  forged = grouped.Grouped(values, support, 7, 3, size)
  with pytest.raises(ValueError, match="values for 3 groups"):
    wire.loads(wire.dumps(forged))


def test_groups_of_a_row_that_differ_in_size_are_refused():
  with pytest.raises(ValueError, match="groups of equal size"):
    send_groups(vector(), owners=np.arange(19) % 7)


@pytest.mark.parametrize("counts", [(0, 1), (1, 5)])
def test_more_groups_than_a_row_has_are_refused(counts):
  with pytest.raises(ValueError, match="from 1 to all groups"):
    send_groups(vector(), counts=counts)
