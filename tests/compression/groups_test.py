import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import groups, wire

KEY = jax.random.key(0)
# Two rows of groups, of three entries each and of two, and two free entries.
OWNERS = np.array([0, 1, 2, 0, -1, 1, 2, 0, 1, 2, 3, 4, 5, 6, -1, 3, 4, 5, 6])
SIZES, COUNTS = (3, 4), (1, 2)


def vector():
  return np.random.default_rng(2).normal(size=19).astype(np.float32)


def send(sent, owners=OWNERS, sizes=SIZES, counts=COUNTS):
  compressor = groups.top_k_groups(owners, sizes, counts)
  transmit = jax.jit(lambda x: compression.transmit(compressor, x, (), KEY))
  return transmit(sent)


def largest(sent):
  """The entries of the groups with the largest norms, group by group."""
  norms = [np.linalg.norm(sent[OWNERS == group]) for group in range(7)]
  kept = [-1, np.argmax(norms[:3]), *(3 + np.argsort(norms[3:])[-2:])]
  return np.isin(OWNERS, kept)


def test_the_groups_of_the_largest_norms_are_sent_whole():
  sent = vector()
  message = send(sent)
  kept = largest(sent)
  np.testing.assert_array_equal(message.received, np.where(kept, sent, 0))
  np.testing.assert_array_equal(groups.support(message.payload, OWNERS), kept)
  # Three entries of a group, two each of two groups, and two of none.
  assert wire.entries(message.payload) == 3 + 4 + 2


def test_a_choice_of_groups_takes_a_byte_not_one_an_entry():
  message = wire.dumps(send(vector()).payload)
  assert 4 * 9 + 1 < len(message) < 4 * 9 + 1 + 16
  arrived = wire.loads(message)
  assert wire.dumps(arrived) == message
  got = groups.top_k_groups(OWNERS, SIZES, COUNTS).decode(arrived)
  np.testing.assert_array_equal(got, send(vector()).received)


def test_all_groups_are_the_vector_and_need_no_names():
  message = send(vector(), counts=SIZES)
  np.testing.assert_array_equal(message.received, vector())
  assert not message.payload.support.size


def test_the_values_of_groups_can_be_compressed_further():
  compressor = compression.chain(
    groups.top_k_groups(OWNERS, SIZES, COUNTS),
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
  together = jax.vmap(lambda x: send(x).received)(sent)
  alone = [send(x).received for x in sent]
  np.testing.assert_array_equal(together, alone)


def test_a_message_that_names_too_few_groups_is_refused():
  payload = send(vector()).payload
  forged = groups.Grouped(payload.values, payload.support, 7, 2, 19)
  with pytest.raises(ValueError, match="support"):
    wire.loads(wire.dumps(forged))


@pytest.mark.parametrize(
  ("values", "size"), [(np.zeros(2, np.float32), 19), (np.zeros(9), 8)]
)
def test_a_message_of_too_few_or_too_many_values_is_refused(values, size):
  support = send(vector()).payload.support
  forged = groups.Grouped(values, support, 7, 3, size)
  with pytest.raises(ValueError, match="values, of 3 groups"):
    wire.loads(wire.dumps(forged))


def test_groups_of_a_row_that_differ_in_size_are_refused():
  with pytest.raises(ValueError, match="one number of entries each"):
    send(vector(), owners=np.arange(19) % 7)


@pytest.mark.parametrize("counts", [(0, 1), (1, 5)])
def test_more_groups_than_a_row_has_are_refused(counts):
  with pytest.raises(ValueError, match="from 1 to all groups"):
    send(vector(), counts=counts)
