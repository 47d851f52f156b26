import jax
import numpy as np
import optax

from fedjax_llm.federated.algorithms import fed_avg, fed_ex_lora
from tests import placements

KEY = jax.random.key(3)
RATE = 0.05
SGD = optax.sgd(RATE, momentum=0.9)


def play(problem, algorithm, cohorts, frozen):
  """The parameters after each round, and the last state."""
  step = jax.jit(algorithm.round)
  state = algorithm.init(problem.trainable)
  for cohort in cohorts:
    state, _ = step(state, frozen, problem.examples, cohort, KEY)
  return jax.device_get(state)


def split(flat):
  a, b, _ = np.split(flat, [12, 20])
  return a.reshape(6, 2), b.reshape(2, 4)


def test_fed_ex_lora_is_its_oracle_in_float64(problem, oracle):
  # Unequal clients: a plain mean, and its error in the products.
  cohorts = problem.cohorts(4)
  flat, delta = oracle.flatten(problem.trainable), np.zeros((6, 4))
  for cohort in cohorts:
    base = problem._replace(frozen={"w": problem.frozen["w"] + delta})
    everyone, product = np.zeros_like(flat), np.zeros((6, 4))
    for indices, mask in zip(cohort.indices, cohort.mask, strict=True):
      trained = oracle.local_sgd(
        base, flat, indices, mask, RATE, 0.9, problem.scale
      )
      everyone += trained / 3
      a, b = split(trained)
      for rank in range(2):
        product += np.outer(a[:, rank], b[rank]) / 3
    flat = everyone
    a, b = split(flat)
    delta = delta + problem.scale * (product - a @ b)
  with jax.enable_x64(True):
    algorithm = fed_ex_lora.fed_ex_lora(
      problem.scaled_loss_fn,
      SGD,
      scale=problem.scale,
      population=problem.population,
      placement=placements.ALONE,
    )
    frozen = {"kernel": problem.frozen["w"]}
    state = play(problem, algorithm, cohorts, frozen)
  got = oracle.flatten(state.trainable)
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-14)
  assert np.abs(delta).max() > 1e-3
  np.testing.assert_allclose(
    state.residual["delta"], delta, rtol=1e-12, atol=1e-14
  )


def test_with_one_client_it_is_fed_avg(problem):
  # There is nothing that the mean of one could miss.
  cohorts = [problem.cohort(2, order=i) for i in range(2)]
  exact = fed_ex_lora.fed_ex_lora(
    problem.scaled_loss_fn, SGD, scale=problem.scale, population=7
  )
  plain = fed_avg.fed_avg(problem.scaled_loss_fn, SGD, optax.sgd(1.0))
  frozen = {"kernel": problem.frozen["w"]}
  got, expected = (
    play(problem, x, cohorts, frozen).trainable for x in (exact, plain)
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    got,
    expected,
  )
