import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.compression import base, sparse, wire
from fedjax_llm.federated import channels, downloads, rounds

KEY = jax.random.key(1)
# Whatever is sent arrives as noise of the key.
NOISE = base.stateless(
  lambda vector, key: base.Dense(jax.random.normal(key, vector.shape)),
  lambda payload: payload.values,
)


def test_every_round_and_every_message_of_it_has_draws_of_its_own():
  sent = [
    downloads.send(NOISE, jnp.zeros(3), (), number, KEY, *stream).received
    for number in (0, 1)
    for stream in ((), (0,), (1,))
  ]
  assert len({tuple(x.tolist()) for x in sent}) == 6


def test_each_tier_receives_what_its_channel_sends():
  tiers = channels.Tiers(
    (channels.Channel(sparse.top_k(0.5)), channels.Channel()), lambda x: x
  )
  trainable = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
  state = rounds.ServerState(jnp.int32(0), trainable, (), (), ((), ()), ())
  shared, states = downloads.broadcast(tiers, state, {"base": 1}, KEY)
  assert shared.received[0].tolist() == [0, -4, 3, 0]
  assert shared.received[1].tolist() == [1, -4, 3, 2]
  assert shared.masks is None
  assert states == ((), ())


def test_sizes_are_those_of_all_messages_of_a_client_s_tier():
  short, long = (base.Dense(np.zeros(n, np.float32)) for n in (2, 5))
  got = downloads.sizes([short, (short, long)], jnp.array([1, 0, 1]))
  one, both = wire.nbytes(short), wire.nbytes(short) + wire.nbytes(long)
  assert got["download_bytes"].tolist() == [both, one, both]
  assert got["download_entries"].tolist() == [7, 2, 7]
  assert got["download_bytes"].dtype == jnp.int32
