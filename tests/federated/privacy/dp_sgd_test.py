import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.federated import clients, rounds
from fedjax_llm.federated.privacy import dp_sgd
from tests import placements

KEY = jax.random.key(5)
MOMENTUM = optax.sgd(0.05, momentum=0.9)
REPLACE = optax.sgd(1.0)


@functools.cache
def program(loss_fn, optimizer=MOMENTUM, **options):
  options = dict(clip_norm=1.0, noise_multiplier=0.0) | options
  train = dp_sgd.local_update(loss_fn, optimizer, **options)
  return jax.jit(train)


def run(problem, client, trains=None, examples=None, **options):
  """Trains on a cohort of one."""
  return program(problem.loss_fn, **options)(
    problem.trainable,
    problem.frozen,
    problem.examples if examples is None else examples,
    client.indices[0],
    client.mask[0],
    KEY,
    trains,
  )


def noise_of(steps, real, *, batch=4, n=4096, clip_norm=3.0, multiplier=0.7):
  """What training on examples without a gradient does to `n` zeros."""

  def loss_fn(trainable, frozen, examples, mask, key):
    return 0 * trainable.sum(), mask.sum()

  train = program(
    loss_fn, REPLACE, clip_norm=clip_norm, noise_multiplier=multiplier
  )
  mask = np.broadcast_to(np.arange(batch) < real, (steps, batch))
  rows = np.zeros((steps, batch), np.int32)
  zeros = jnp.zeros(n)
  return -np.asarray(train(zeros, {}, jnp.zeros(1), rows, mask, KEY).trainable)


@pytest.mark.parametrize("microbatch", [None, 1, 2])
def test_dp_sgd_is_its_oracle_in_float64(problem, oracle, microbatch):
  # Five examples in batches of three: clipped one by one, over three always.
  rate, norm, batch = 0.05, 3.2, 3
  client = problem.cohort(3, steps=3, batch=batch)
  flat, velocity = oracle.flatten(problem.trainable), 0.0
  lengths = []
  for rows, real in zip(client.indices[0], client.mask[0], strict=True):
    total = np.zeros_like(flat)
    for row in rows[real]:
      x, y = problem.examples["x"][row], problem.examples["y"][row]
      gradient = oracle.gradient(flat, problem.frozen["w"], x, y)
      lengths.append(np.sqrt((gradient**2).sum()))
      total += gradient / max(lengths[-1] / norm, 1)
    if real.any():
      velocity = 0.9 * velocity + total / batch
      flat = flat - rate * velocity
  assert min(lengths) < norm < max(lengths)
  with jax.enable_x64(True):
    training = run(problem, client, clip_norm=norm, microbatch=microbatch)
    got, count = oracle.flatten(training.trainable), int(training.count)
  np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-14)
  assert count == 5


def test_without_bound_and_noise_full_batches_train_as_ever(problem):
  client = problem.cohort(2)  # Eight examples in four steps of two.
  got = run(problem, client, clip_norm=np.inf)
  train = jax.jit(clients.local_update(problem.loss_fn, MOMENTUM))
  arguments = (problem.trainable, problem.frozen, problem.examples)
  expected = train(*arguments, client.indices[0], client.mask[0], KEY)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, got, expected)


@pytest.mark.parametrize("real", [1, 4])
def test_a_step_has_noise_over_the_size_of_the_batch(real):
  # However many examples are in it: z S / 4.
  noise, expected = noise_of(1, real), 0.7 * 3.0 / 4
  assert abs(noise.mean()) < 5 * expected / np.sqrt(noise.size)
  assert abs(noise.std() / expected - 1) < 5 / np.sqrt(2 * noise.size)


def test_every_step_has_noise_of_its_own():
  once, twice = noise_of(1, 1), noise_of(2, 1)
  second = twice - once
  assert abs(second.std() / once.std() - 1) < 10 / np.sqrt(2 * once.size)
  assert abs(np.corrcoef(once, second)[0, 1]) < 5 / np.sqrt(once.size)


def test_a_step_without_examples_changes_nothing(problem):
  client = problem.cohort(2)
  noisy = functools.partial(run, problem, noise_multiplier=1.0)
  nobody = noisy(client._replace(mask=np.zeros_like(client.mask)))
  same = np.testing.assert_array_equal
  as_float32 = jax.tree.map(np.float32, problem.trainable)
  jax.tree.map(same, nobody.trainable, as_float32)
  # Nor does it touch the momentum, or the noise of the steps before it.
  padded = problem.cohort(2, steps=6)
  jax.tree.map(same, noisy(padded), noisy(client))


@pytest.mark.parametrize("microbatch", [None, 1])
def test_an_example_that_diverges_leaves_no_mark(problem, microbatch):
  client = problem.cohort(2)
  broken = jax.tree.map(np.copy, problem.examples)
  broken["x"][client.indices[0, 1, 1]] = np.nan
  train = functools.partial(run, problem, microbatch=microbatch)
  got = train(client, examples=broken).trainable
  mask = client.mask.copy()
  mask[0, 1, 1] = False
  expected = train(client._replace(mask=mask)).trainable
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_what_is_not_trained_gets_no_noise_and_takes_no_room(problem):
  # The clip norm is all for the head, of which a step's gradient exceeds it.
  client = problem.cohort(2, steps=1, batch=1)
  trains = jax.tree.map(lambda x: np.zeros(x.shape, bool), problem.trainable)
  trains["head"][:2] = True
  options = dict(optimizer=REPLACE, clip_norm=1e-3)
  moved = run(problem, client, trains, noise_multiplier=1.0, **options)
  for name, start in problem.trainable.items():
    still = np.asarray(moved.trainable[name] == np.float32(start))
    np.testing.assert_array_equal(still, ~trains[name])
  head = run(problem, client, trains, **options).trainable["head"]
  step = np.asarray(head) - np.float32(problem.trainable["head"])
  np.testing.assert_allclose(np.linalg.norm(step), 1e-3, rtol=1e-3)


def test_a_private_round_does_not_depend_on_its_placement(problem):
  # Clients of different numbers of steps, one by one and together.
  train = dp_sgd.local_update(
    problem.loss_fn,
    MOMENTUM,
    clip_norm=0.5,
    noise_multiplier=0.1,
    microbatch=1,
  )
  states = []
  for clients_per_step in (1, placements.EVERYBODY):
    algorithm = rounds.federated_round(
      train, REPLACE, placement=placements.on(1, clients_per_step)
    )
    state, metrics = jax.jit(algorithm.round)(
      algorithm.init(problem.trainable),
      problem.frozen,
      problem.examples,
      problem.cohort(1, 2, 4),
      KEY,
    )
    assert metrics["tokens"] == 3 + 8 + 2
    states.append(state)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, *states)


def test_frozen_weights_are_not_batched_over_examples(problem):
  client = problem.cohort(2)
  jaxpr = jax.make_jaxpr(program(problem.loss_fn))(
    problem.trainable,
    problem.frozen,
    problem.examples,
    client.indices[0],
    client.mask[0],
    KEY,
  )
  assert "f32[6,4]" in str(jaxpr)
  assert "f32[2,6,4]" not in str(jaxpr)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"clip_norm": 0}, "clip_norm > 0, got clip_norm=0"),
    ({"noise_multiplier": -1}, "noise_multiplier=-1 to be >= 0"),
    (
      {"clip_norm": np.inf, "noise_multiplier": 1},
      "finite clip_norm with noise_multiplier=1",
    ),
    ({"microbatch": 0}, "microbatch=0 to be None or >= 1"),
  ],
)
def test_bad_values_are_named(problem, options, message):
  options = dict(clip_norm=1.0, noise_multiplier=0.0) | options
  with pytest.raises(ValueError, match=message):
    dp_sgd.local_update(problem.loss_fn, MOMENTUM, **options)
