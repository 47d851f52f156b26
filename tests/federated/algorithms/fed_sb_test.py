import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.compression import base, wire
from fedjax_llm.data import batches
from fedjax_llm.federated.algorithms import fed_sb
from fedjax_llm.models import decoder, language, lora
from tests import placements

KEY = jax.random.key(3)
SGD = optax.sgd(0.05, momentum=0.9)


@functools.cache
def compose(loss_fn, bases):
  algorithm = fed_sb.fed_sb(
    loss_fn, SGD, optax.sgd(1.0), bases=bases, placement=placements.ALONE
  )
  return algorithm, jax.jit(algorithm.round)


def run(problem, bases, cohorts):
  """The states before and after each round, and the last metrics."""
  algorithm, step = compose(problem.loss_fn, bases)
  states, metrics = [algorithm.init(problem.trainable)], None
  for cohort in cohorts:
    state, metrics = step(
      states[-1], problem.frozen, problem.examples, cohort, KEY
    )
    states.append(state)
  return states, metrics


def fixed_bases(a, b):
  """The same bases whatever the parameters; the core is not zero."""
  core = np.array([[0.1, 0.0], [0.2, -0.3]])
  return lambda trainable: {**trainable, "a": a, "b": b, "core": core}


def test_fed_sb_is_its_oracle_in_float64(problem, oracle):
  # The bases are not orthonormal, so that none can replace another.
  cohorts = problem.cohorts(4)
  rng = np.random.default_rng(1)
  a, b = rng.normal(0, 0.5, (6, 2)), rng.normal(0, 0.5, (2, 4))
  bases = fixed_bases(a, b)
  core = bases({})["core"]
  head = problem.trainable["head"]

  def train(core, head, indices, mask):
    velocity = np.zeros((2, 2)), np.zeros(4)
    for rows, real in zip(indices, mask, strict=True):
      own = rows[real]
      slope = np.zeros((2, 2)), np.zeros(4)
      for row in own:
        flat = np.concatenate([(a @ core).ravel(), b.ravel(), head])
        x, y = problem.examples["x"][row], problem.examples["y"][row]
        g = oracle.gradient(flat, problem.frozen["w"], x, y)
        slope = slope[0] + a.T @ g[:12].reshape(6, 2), slope[1] + g[20:]
      if own.size:
        velocity = [
          0.9 * v + s / own.size for v, s in zip(velocity, slope, strict=True)
        ]
        core, head = core - 0.05 * velocity[0], head - 0.05 * velocity[1]
    return core, head

  expected = []
  for cohort in cohorts:
    trained = [
      train(core, head, *client)
      for client in zip(cohort.indices, cohort.mask, strict=True)
    ]
    weights = np.float64(cohort.weights) / cohort.weights.sum(dtype=np.float64)
    core, head = (
      sum(w * x for w, x in zip(weights, xs, strict=True))
      for xs in zip(*trained, strict=True)
    )
    expected.append(np.concatenate([(a @ core).ravel(), b.ravel(), head]))
  with jax.enable_x64(True):
    states, _ = run(problem, bases, cohorts)
    got = [oracle.flatten(state.trainable) for state in states[1:]]
  assert got[0].dtype == np.float64
  np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_cores_travel_bases_stay_and_products_are_averaged_exactly(problem):
  # The mean of the cores is exact. The bytes are those of rank^2 entries and
  # the head.
  bases = fed_sb.random_bases(jax.random.key(1))
  cohort = problem.cohort(2, 5, 3)

  def after(*weights):
    weighted = cohort._replace(weights=np.array(weights, np.float32))
    return run(problem, bases, [weighted])

  states, metrics = after(1, 1, 1)
  size = len(wire.dumps(base.Dense(np.zeros(2 * 2 + 4, np.float32))))
  for name in ("download_bytes", "upload_bytes"):
    assert metrics[name].tolist() == [size] * 3
  start, end = states
  jax.tree.map(np.testing.assert_array_equal, start.fixed, end.fixed)
  product = lambda tree: np.float64(tree["a"]) @ np.float64(tree["b"])
  alone = [product(after(*row)[0][-1].trainable) for row in np.eye(3)]
  together = product(end.trainable)
  assert abs(together).max() > 1e-3
  # Float32 of numbers below one.
  np.testing.assert_allclose(together, sum(alone) / 3, atol=1e-6)


def test_random_bases_are_orthonormal_and_start_at_the_base_model():
  shape = {"a": jnp.zeros((3, 6, 2)), "b": jnp.zeros((3, 2, 4))}
  tree = {"layers": {"up": shape, "down": shape}, "score": jnp.ones(5)}
  drawn = fed_sb.random_bases(jax.random.key(1))(tree)
  up, down = drawn["layers"]["up"], drawn["layers"]["down"]
  eye = np.broadcast_to(np.eye(2), (3, 2, 2))
  np.testing.assert_allclose(up["a"].mT @ up["a"], eye, atol=1e-6)
  np.testing.assert_allclose(up["b"] @ up["b"].mT, eye, atol=1e-6)
  np.testing.assert_array_equal(up["core"], np.zeros((3, 2, 2)))
  np.testing.assert_array_equal(drawn["score"], tree["score"])
  assert not np.allclose(up["a"], down["a"])
  # Those of a layer do not depend on what others there are.
  alone = fed_sb.random_bases(jax.random.key(1))({"layers": {"up": shape}})
  jax.tree.map(np.testing.assert_array_equal, alone["layers"]["up"], up)


def test_gradient_bases_are_the_singular_vectors_of_the_kernel_s(
  problem, oracle
):
  # By NumPy: the gradient of `w`, cut to rank two, is the first step.
  total = np.zeros((6, 4))
  count = len(problem.examples["y"])
  head = problem.trainable["head"]
  for x, y in zip(problem.examples["x"], problem.examples["y"], strict=True):
    hidden = np.tanh(x @ problem.frozen["w"])
    back = 2 * (hidden @ head - y) * head * (1 - hidden**2)
    total += np.outer(x, back) / count
  left, values, right = np.linalg.svd(total)
  with jax.enable_x64(True):
    bases = fed_sb.gradient_bases(
      problem.loss_fn,
      problem.frozen,
      problem.examples,
      KEY,
      learning_rate=0.1,
      iterations=20,
    )
    start = jax.device_get(bases(problem.trainable))
  np.testing.assert_allclose(
    start["core"], -0.1 * np.diag(values[:2]), atol=1e-8
  )
  step = start["a"] @ start["core"] @ start["b"]
  expected = -0.1 * left[:, :2] @ np.diag(values[:2]) @ right[:2]
  # The power iteration has not wholly converged.
  np.testing.assert_allclose(step, expected, atol=1e-6)
  np.testing.assert_array_equal(start["head"], head)


def test_gradient_bases_of_a_decoder_start_at_a_step_on_its_kernels():
  # The kernels' own gradients, by differentiating a model without an adapter.
  config = decoder.DecoderConfig(
    vocab_size=30,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=8,
  )
  whole = decoder.Decoder(config)
  tokens = np.random.default_rng(0).integers(0, 30, (3, 6))
  params = jax.jit(whole.init)(KEY, tokens)["params"]
  rows = batches.Examples(np.int32(tokens), np.ones((3, 5), bool))
  settings = lora.LoRA(rank=2, alpha=6.0, targets=("q_proj", "down_proj"))
  model = decoder.Decoder(config, settings)
  everything = np.ones(3, bool)

  @jax.jit
  @jax.grad
  def gradient(params):
    loss = language.loss_fn(whole)
    total, count = loss({}, params, rows, everything, KEY)
    return total / count

  bases = fed_sb.gradient_bases(
    language.loss_fn(model), params, rows, KEY, learning_rate=0.1, iterations=30
  )
  layers = bases(lora.init(model, KEY))["layers"]
  slopes = gradient(params)["layers"]
  for group, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
    pair = layers[group][name]
    kernel = np.float64(slopes[group][name]["kernel"])
    left, values, right = np.linalg.svd(kernel, full_matrices=False)
    leading = left[..., :2] * values[:, None, :2] @ right[:, :2]
    step = settings.scale * pair["a"] @ pair["core"] @ pair["b"]
    expected = -0.1 * settings.scale**2 * leading
    # The power iteration has not wholly converged.
    error = abs(step - expected).max()
    assert error < 1e-2 * abs(expected).max()


def test_a_rank_above_a_side_of_the_layer_is_refused(problem):
  wide = {"a": np.zeros((6, 5)), "b": np.zeros((5, 4))}
  with pytest.raises(ValueError, match="at most 4, its smaller side, got 5"):
    fed_sb.random_bases(KEY)(wide)
  with pytest.raises(ValueError, match="iterations=0"):
    fed_sb.gradient_bases(
      problem.loss_fn,
      problem.frozen,
      problem.examples,
      KEY,
      learning_rate=0.1,
      iterations=0,
    )
