"""What every compressor promises: one table, and the laws of all its rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import autoencoder, layouts, pca, row_network
from fedjax_llm.compression import grouped, wire

chain, error_feedback = compression.chain, compression.error_feedback
top_k, random_k = compression.top_k, compression.random_k
cast, stochastic_uniform = compression.cast, compression.stochastic_uniform


def thirds(n):
  return compression.select(np.arange(n) % 3 == 0)


@functools.cache
def principal(n):
  snapshots = np.random.default_rng(0).normal(size=(9, n)).astype(np.float32)
  return pca.fit(snapshots - snapshots.mean(axis=0), 6)._replace(
    mean=jnp.zeros(n)
  )


@functools.cache
def variables(n):
  layout = layouts.columns({"w": np.zeros(n)}, width=16)
  network = row_network.network(16, latents=5)
  return layout, network, autoencoder.init(network, layout, jax.random.key(0))


def codec(n, bits):
  layout, network, both = variables(n)
  network = dataclasses.replace(network, bits=bits)
  return autoencoder.autoencoder(
    autoencoder.Codec(layout, network, jnp.ones(1), **both)
  )


COMPRESSORS = {
  "identity": lambda n: compression.identity(),
  "top_k(1)": lambda n: top_k(1.0),
  "top_k(1/4)": lambda n: top_k(1 / 4),
  "top_k(1/64)": lambda n: top_k(1 / 64),
  "top_k_per_group": lambda n: compression.top_k_per_group(
    np.arange(n) % 3, 0.3
  ),
  "random_k": lambda n: random_k(0.3),
  "select": thirds,
  "cast(bfloat16)": lambda n: cast(jnp.bfloat16),
  "cast(float16)": lambda n: cast(jnp.float16),
  **{
    f"stochastic_uniform({b})": lambda n, b=b: stochastic_uniform(b)
    for b in range(1, 9)
  },
  **{
    f"lloyd_max({b})": lambda n, b=b: compression.lloyd_max(b, block=50)
    for b in range(1, 5)
  },
  "top_k + lloyd_max": lambda n: chain(top_k(1 / 4), compression.lloyd_max(2)),
  "lloyd_max, unbiased": lambda n: compression.lloyd_max(2, unbiased=True),
  "natural": lambda n: compression.natural(),
  "qsgd": lambda n: compression.qsgd(4, block=50),
  "tern_grad": lambda n: compression.tern_grad(block=50),
  "sign": lambda n: compression.sign(),
  "sign, block of 50": lambda n: compression.sign(block=50, unbiased=True),
  "stc": lambda n: compression.stc(1 / 8),
  "ef_sign_sgd": lambda n: compression.ef_sign_sgd(),
  "rotate": lambda n: compression.rotate(block=64),
  "rotate + stochastic_uniform": lambda n: chain(
    compression.rotate(), stochastic_uniform(3)
  ),
  "drive": lambda n: compression.drive(block=64),
  "eden(0.5)": lambda n: compression.eden(0.5, block=64),
  "eden(2)": lambda n: compression.eden(2, block=64),
  "dgc": lambda n: compression.deep_gradient_compression(1 / 4),
  "power_sgd": lambda n: compression.power_sgd(2),
  "count_sketch": lambda n: compression.count_sketch(5, 40),
  "count_sketch + top_k": lambda n: compression.count_sketch(
    4, 64, density=1 / 8
  ),
  "count_sketch + stochastic_uniform": lambda n: chain(
    compression.count_sketch(3, 50), stochastic_uniform(8)
  ),
  "trellis(1/2)": lambda n: compression.trellis(1 / 2, memory=5, block=100),
  "rotate + trellis": lambda n: chain(
    compression.rotate(block=64), compression.trellis(2, memory=4)
  ),
  "trellis, profile": lambda n: compression.trellis(
    1, memory=5, profile=jnp.linspace(1, 9, n)
  ),
  "trellis, unbiased": lambda n: chain(
    compression.rotate(block=64),
    compression.trellis(1 / 2, memory=5, unbiased=True),
  ),
  "relative_to": lambda n: compression.relative_to(
    jnp.linspace(-1, 1, n), compression.identity()
  ),
  "stochastic_uniform, block of 5": lambda n: stochastic_uniform(4, block=5),
  "top_k + stochastic_uniform": lambda n: chain(
    top_k(1 / 4), stochastic_uniform(4)
  ),
  "top_k + cast": lambda n: chain(top_k(1 / 4), cast(jnp.bfloat16)),
  "random_k + stochastic_uniform": lambda n: chain(
    random_k(0.3), stochastic_uniform(3)
  ),
  "select + top_k + cast": lambda n: chain(
    thirds(n), top_k(1 / 4), cast(jnp.float16)
  ),
  "top_k_per_segment + stochastic_uniform": lambda n: chain(
    grouped.top_k_per_segment(
      (n // 3, n // 3, n - 2 * (n // 3)), (1 / 4, 1 / 4, 1.0)
    ),
    stochastic_uniform(4),
  ),
  "top_k_groups + stochastic_uniform": lambda n: chain(
    # Sixty-four groups of four entries, and one of none.
    grouped.top_k_groups(np.append(np.arange(n - 1) % 64, -1), (64,), (21,)),
    stochastic_uniform(4),
  ),
  "send_mask": lambda n: grouped.send_mask(np.arange(n) % 3 == 0, -(-n // 3)),
  "pca": lambda n: pca.pca(principal(n)),
  "autoencoder": lambda n: codec(n, None),
  "autoencoder, quantised": lambda n: codec(n, 2),
  "autoencoder + stochastic_uniform": lambda n: chain(
    codec(n, None), stochastic_uniform(4)
  ),
  "feedback of cast": lambda n: error_feedback(cast(jnp.bfloat16)),
  "feedback of a chain": lambda n: error_feedback(
    chain(top_k(1 / 4), stochastic_uniform(2))
  ),
  # The mask never moves, so the residual stays with its entries.
  "a chain with feedback": lambda n: chain(
    thirds(n), error_feedback(stochastic_uniform(2))
  ),
}
# Their products of matrices add up in another order under vmap.
PRODUCTS = {name for name in COMPRESSORS if "autoencoder" in name} | {"pca"}
MANY_LENGTHS = (
  *(
    "identity",
    "top_k + stochastic_uniform",
    "stochastic_uniform(3)",
    "natural",
    "tern_grad",
  ),
  *(
    "stc",
    "rotate + stochastic_uniform",
    "eden(0.5)",
    "power_sgd",
    "count_sketch",
  ),
  "trellis(1/2)",
)
ROWS = [(name, 257) for name in COMPRESSORS]
ROWS += [(name, n) for name in MANY_LENGTHS for n in (1, 2, 7, 255, 256)]
each_row = pytest.mark.parametrize(("name", "n"), ROWS)
each_compressor = pytest.mark.parametrize("name", COMPRESSORS)
CLIENTS = 3


@functools.cache
def programs(name, n):
  """A compressor and its encode and decode, compiled once for all tests."""
  compressor = COMPRESSORS[name](n)
  return compressor, jax.jit(compressor.encode), jax.jit(compressor.decode)


def vectors(n):
  return np.random.default_rng(n).normal(size=(CLIENTS, n)).astype(np.float32)


@functools.cache
def keys():
  return jax.random.split(jax.random.key(0), CLIENTS)


def bits(array):
  return np.asarray(array).tobytes()


@each_row
def test_a_message_has_the_length_and_the_meaning_of_its_payload(name, n):
  compressor, encode, decode = programs(name, n)
  vector = vectors(n)[0]
  payload, _ = encode(vector, compressor.init(vector), keys()[0])
  message = wire.dumps(payload)
  assert wire.nbytes(payload) == len(message)
  received = decode(payload)
  assert received.shape == vector.shape
  arrived = wire.loads(message)
  assert wire.dumps(arrived) == message
  assert jax.tree.structure(arrived) == jax.tree.structure(payload)
  assert bits(decode(arrived)) == bits(received)


@each_compressor
def test_the_length_of_a_message_is_known_before_the_vector_is(name):
  compressor = COMPRESSORS[name](257)
  lengths = []

  def encode(vector, key):
    payload, _ = compressor.encode(vector, compressor.init(vector), key)
    lengths.append(wire.nbytes(payload))  # Of tracers.
    return payload

  vector, key = vectors(257)[0], keys()[0]
  payload = jax.eval_shape(encode, vector, key)
  _, compiled, _ = programs(name, 257)
  sent, _ = compiled(vector, compressor.init(vector), key)
  assert lengths == [wire.nbytes(payload)] == [len(wire.dumps(sent))]


@each_compressor
def test_clients_under_vmap_send_what_they_send_alone(name):
  compressor, encode, decode = programs(name, 257)
  batch = vectors(257)
  states = jax.vmap(compressor.init)(batch)
  payloads, after = jax.jit(jax.vmap(compressor.encode))(batch, states, keys())
  received = jax.jit(jax.vmap(compressor.decode))(payloads)
  together = jax.device_get((payloads, after))
  same = np.testing.assert_array_equal
  if name in PRODUCTS:
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  for client in range(CLIENTS):
    state = compressor.init(batch[client])
    alone = encode(batch[client], state, keys()[client])
    jax.tree.map(
      lambda x, y, i=client: same(x[i], y),
      together,
      alone,
    )
    same(received[client], decode(alone[0]))


@each_compressor
def test_zero_arrives_as_zero_and_leaves_nothing_behind(name):
  compressor, encode, decode = programs(name, 257)
  zero = np.zeros(257, np.float32)
  before = compressor.init(zero)
  payload, after = encode(zero, before, keys()[0])
  assert not np.any(decode(payload))
  jax.tree.map(np.testing.assert_array_equal, after, before)


@each_compressor
def test_what_arrives_has_the_type_of_what_was_sent(name):
  for dtype in (jnp.float32, jnp.bfloat16):
    vector = jax.ShapeDtypeStruct((257,), dtype)
    compressor = COMPRESSORS[name](257)
    state = jax.eval_shape(compressor.init, vector)
    transmit = functools.partial(compression.transmit, compressor)
    sent = jax.eval_shape(transmit, vector, state, keys()[0])
    assert sent.received == vector
    assert sent.state == state
