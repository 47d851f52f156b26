import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import sparse
from fedjax_llm.federated import aggregators, channels, clients, rounds
from fedjax_llm.federated.privacy import mechanisms
from tests import placements

KEY = jax.random.key(8)
UPDATES = np.random.default_rng(0).normal(0, 1, (3, 50)).astype(np.float32)
UPDATES *= np.array([[0.1], [1], [10]], np.float32)
LENGTHS = np.linalg.norm(UPDATES, axis=1)
EVERYONE = np.ones(3, np.float32)
SGD = optax.sgd(0.05, momentum=0.9)


def private(clip_norm, noise_multiplier=0.0, **options):
  return mechanisms.private_mean(
    clip_norm=clip_norm,
    noise_multiplier=noise_multiplier,
    **{"clients": 3} | options,
  )


def adaptive(**options):
  options = (
    dict(
      initial_clip_norm=1.0,
      quantile=0.5,
      noise_multiplier=0.0,
      count_noise=0.0,
      clients=3,
    )
    | options
  )
  return mechanisms.adaptive_private_mean(**options)


def aggregate(aggregator, updates=UPDATES, weights=EVERYONE, key=KEY):
  """The release, and the state after it."""
  state = aggregator.init()
  share = lambda update, weight: aggregator.share(update, weight, state)
  shares = jax.vmap(share)(jnp.asarray(updates), weights)
  total = jax.tree.map(lambda x: x.sum(0), shares)
  return aggregator.finish(total, state, key)


def draws(fn, count):
  return jax.vmap(fn)(jax.random.split(KEY, count))


def assert_deviation(sample, expected):
  # Five standard deviations of that of a normal sample, and of its mean.
  n = sample.size
  assert abs(sample.mean()) < 5 * expected / np.sqrt(n)
  assert abs(sample.std() / expected - 1) < 5 / np.sqrt(2 * n)


def test_a_clipped_update_is_within_the_norm_and_keeps_its_direction():
  for update, length in zip(UPDATES, LENGTHS, strict=True):
    clipped = mechanisms.clip(update, 5.0)
    assert np.linalg.norm(clipped) <= 5 * (1 + 1e-6)
    expected = update * min(1, 5 / length)
    np.testing.assert_allclose(clipped, expected, rtol=1e-5)
  np.testing.assert_array_equal(mechanisms.clip(UPDATES[0], 5.0), UPDATES[0])
  assert not mechanisms.clip(jnp.zeros(4), 5.0).any()


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e30])
def test_what_has_no_finite_norm_leaves_no_mark(broken):
  update = np.array([1.0, broken], np.float32)
  assert not mechanisms.clip(update, 5.0).any()


def test_a_norm_that_nobody_exceeds_gives_the_plain_mean():
  norm = 2 * LENGTHS.max()
  mean, _ = aggregate(aggregators.uniform_mean())
  got, _ = aggregate(private(norm))
  np.testing.assert_allclose(got, mean, rtol=1e-5, atol=1e-7)
  got, _ = aggregate(private(np.inf))
  np.testing.assert_allclose(got, mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", [1e-3, 0.1])
def test_if_everyone_clips_the_mean_is_of_directions(norm):
  got, _ = aggregate(private(norm))
  directions = UPDATES / LENGTHS[:, None]
  expected = directions.mean(0)
  np.testing.assert_allclose(got / norm, expected, rtol=1e-5, atol=1e-7)


def test_weights_say_no_more_than_who_is_there():
  expected, _ = aggregate(private(1.0), weights=np.float32([1, 0, 1]))
  got, _ = aggregate(private(1.0), weights=np.float32([7, 0, 2]))
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("aggregator", [private(1.0), adaptive()])
def test_who_is_absent_adds_zeros_to_a_mean_over_as_many(aggregator):
  broken = UPDATES.copy()
  broken[1] = np.nan
  got, _ = aggregate(aggregator, broken, np.float32([1, 0, 1]))
  clipped = UPDATES / np.maximum(LENGTHS, 1)[:, None]
  expected = (clipped[0] + clipped[2]) / 3
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_every_entry_gets_noise():
  expected = 0.6 * 5 / 3  # z S / C.
  aggregator = private(5.0, 0.6)
  nobody = np.zeros(3, np.float32)
  fn = lambda key: aggregate(aggregator, weights=nobody, key=key)[0]
  noise = np.asarray(jax.jit(draws, static_argnums=(0, 1))(fn, 1000))
  assert_deviation(noise, expected)
  # Each entry by itself, and none like another.
  deviations = noise.std(0) / expected
  assert abs(deviations - 1).max() < 6 / np.sqrt(2 * 1000)
  correlations = np.corrcoef(noise.T) - np.eye(50)
  assert abs(correlations).max() < 6 / np.sqrt(1000)


def test_both_releases_together_cost_what_the_noise_multiplier_says():
  # A count of halves has sensitivity 1/2, so their multipliers are the noise
  # of the updates over S and twice that of the count: 1/z^2 adds up.
  z, count_noise, rate = 1.5, 1.2, 0.3
  aggregator = adaptive(
    initial_clip_norm=5.0,
    noise_multiplier=z,
    count_noise=count_noise,
    clip_learning_rate=rate,
  )
  nobody = np.zeros(3, np.float32)
  fn = lambda key: aggregate(aggregator, weights=nobody, key=key)
  noise, norms = jax.jit(draws, static_argnums=(0, 1))(fn, 4000)
  of_updates = (z**-2 - (2 * count_noise) ** -2) ** -0.5
  assert of_updates > z
  assert_deviation(np.asarray(noise), of_updates * 5 / 3)
  # Nobody is drawn towards a half, the quantile here.
  steps = np.log(np.asarray(norms) / 5) / -rate
  assert_deviation(steps, count_noise / 3)
  correlation = np.corrcoef(steps, noise[:, 0])[0, 1]
  assert abs(correlation) < 5 / np.sqrt(4000)


def test_without_noise_the_adaptive_norm_finds_the_quantile():
  lengths = np.arange(1, 101, dtype=np.float32)
  updates = jnp.asarray(lengths)[:, None]
  aggregator = adaptive(quantile=0.3, clients=100)

  @jax.jit
  def step(norm):
    shares = jax.vmap(lambda x: aggregator.share(x, jnp.ones(()), norm))(
      updates
    )
    total = jax.tree.map(lambda x: x.sum(0), shares)
    return aggregator.finish(total, norm, KEY)[1]

  norm = aggregator.init()
  once = step(norm)
  # One of a hundred is at most 1: Andrew et al. (2021), equation 1.
  np.testing.assert_allclose(once, np.exp(-0.2 * (0.01 - 0.3)), rtol=1e-6)
  for _ in range(200):
    norm = step(norm)
  # A step near the quantile is of a client's share: exp(0.2 / 100).
  assert 30 / np.exp(0.002) < norm < 31 * np.exp(0.002)


@functools.cache
def compose(loss_fn, aggregator, server, client=SGD, **parts):
  algorithm = rounds.federated_round(
    clients.local_update(loss_fn, client),
    server,
    aggregate=aggregator,
    placement=placements.ALONE,
    **parts,
  )
  return algorithm, jax.jit(algorithm.round)


def play(problem, algorithm, step, cohorts):
  state = algorithm.init(problem.trainable)
  for cohort in cohorts:
    state, _ = step(state, problem.frozen, problem.examples, cohort, KEY)
  return state


def flat(tree):
  return np.asarray(ravel_pytree(tree)[0])


def test_four_private_rounds_are_their_oracle_in_float64(problem, oracle):
  # Clipping follows the sparse upload; weights are equal; the norm adapts.
  norm, rate = 0.3, 0.5
  cohorts = problem.cohorts(4)
  expected = oracle.flatten(problem.trainable)
  norms = [norm]
  for cohort in cohorts:
    total, below = np.zeros_like(expected), 0
    for indices, mask in zip(cohort.indices, cohort.mask, strict=True):
      trained = oracle.local_sgd(problem, expected, indices, mask, 0.05, 0.9)
      update = oracle.top_k(expected - trained, 0.3)
      length = np.sqrt((update**2).sum())
      total += update / max(length / norm, 1)
      below += length <= norm
    expected = expected - 1.3 * total / 3
    norm = norm * np.exp(-rate * (below / 3 - 0.4))
    norms.append(norm)
  assert len(set(np.sign(np.diff(norms)))) == 2  # It went up and down.
  aggregator = adaptive(
    initial_clip_norm=0.3, quantile=0.4, clip_learning_rate=rate
  )
  channel = channels.Channel(upload=sparse.top_k(0.3))
  with jax.enable_x64(True):
    algorithm, step = compose(
      problem.loss_fn, aggregator, optax.sgd(1.3), channel=channel
    )
    state = play(problem, algorithm, step, cohorts)
    got = flat(state.trainable)
  np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
  np.testing.assert_allclose(state.aggregate, norm, rtol=1e-12)


def test_a_round_of_nobody_is_like_one_of_updates_of_zero(problem):
  # So who sees the model cannot tell that the cohort was empty.
  aggregator = private(1.0, 0.5)
  still = optax.sgd(0.0)
  algorithm, step = compose(
    problem.loss_fn, aggregator, optax.adam(0.1), client=still
  )
  cohort = problem.cohort(0, 3, 5)
  absent = cohort._replace(weights=0 * cohort.weights)
  nobody = play(problem, algorithm, step, [absent, cohort])
  silent = play(problem, algorithm, step, [cohort, cohort])
  jax.tree.map(np.testing.assert_array_equal, nobody, silent)
  moved = flat(nobody.trainable) - flat(problem.trainable)
  assert moved.all()


def test_every_round_has_noise_of_its_own(problem, recorder):
  aggregator = private(1.0, 0.5)
  algorithm, step = compose(
    problem.loss_fn, aggregator, recorder, client=optax.sgd(0.0)
  )
  cohort = problem.cohort(0, 3, 5)
  first = flat(play(problem, algorithm, step, [cohort]).optimizer)
  second = flat(play(problem, algorithm, step, [cohort] * 2).optimizer)
  assert (first != second).all()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: private(0.0), "clip_norm > 0, got clip_norm=0.0"),
    (lambda: private(np.nan), "clip_norm > 0, got clip_norm=nan"),
    (
      lambda: private(np.inf, 0.1),
      "finite clip_norm with noise_multiplier=0.1",
    ),
    (lambda: private(1.0, -0.1), "noise_multiplier=-0.1 to be >= 0"),
    (lambda: private(1.0, np.inf), "noise_multiplier=inf to be >= 0"),
    (lambda: private(1.0, clients=0), "clients >= 1, got clients=0"),
    (lambda: adaptive(clients=0), "clients >= 1, got clients=0"),
    (lambda: adaptive(initial_clip_norm=np.inf), "initial_clip_norm=inf"),
    (lambda: adaptive(quantile=1.5), r"quantile in \[0, 1\], got quantile=1.5"),
    (lambda: adaptive(clip_learning_rate=0), "clip_learning_rate=0 to be > 0"),
    (lambda: adaptive(count_noise=-1), "count_noise > .* got count_noise=-1"),
    (
      lambda: adaptive(noise_multiplier=1.0, count_noise=0.5),
      "count_noise > noise_multiplier=1.0 / 2, got count_noise=0.5",
    ),
  ],
)
def test_bad_values_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize("aggregator", [private(1.0), adaptive()])
def test_updates_that_rounding_would_enlarge_are_refused(aggregator):
  with pytest.raises(ValueError, match="float32 or more, got bfloat16"):
    aggregate(aggregator, UPDATES.astype(jnp.bfloat16))
