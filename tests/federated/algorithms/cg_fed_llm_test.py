import functools

import jax
import numpy as np
import optax
import pytest

from fedjax_llm.codecs import pca
from fedjax_llm.compression import base
from fedjax_llm.federated import aggregators, codec_state
from fedjax_llm.federated.algorithms import cg_fed_llm, fed_avg
from tests import placements

KEY = jax.random.key(4)
RATE = 0.05
SGD = optax.sgd(RATE, momentum=0.9)


def basis():
  """A linear codec that loses most of a vector."""
  rng = np.random.default_rng(0)
  rows, _ = np.linalg.qr(rng.normal(0, 1, (24, 9)))
  return pca.Basis(rng.normal(0, 0.01, 24), rows.T.copy())


MEAN, PRODUCT = cg_fed_llm.cg_fed_llm, cg_fed_llm.cg_fed_llm_products
SUM = functools.partial(MEAN, aggregate=aggregators.sum_updates())


@functools.cache
def compose(make, loss_fn, representation="delta", lossless=False):
  algorithm = make(
    loss_fn,
    SGD,
    *([] if make is PRODUCT else [optax.sgd(1.0)]),
    coding=codec_state.Coding(
      basis(), (lambda codec: base.identity()) if lossless else pca.pca, 1000
    ),
    population=7,
    representation=representation,
    placement=placements.ALONE,
  )
  return jax.jit(algorithm.init), jax.jit(algorithm.round)


def play(problem, make, cohorts, *knobs):
  """The server's parameters after each round."""
  init, step = compose(make, problem.loss_fn, *knobs)
  state, trained = init(problem.trainable), []
  for cohort in cohorts:
    state, _ = step(state, problem.frozen, problem.examples, cohort, KEY)
    trained.append(jax.device_get(state.trainable))
  return trained


def np_faf(problem, oracle, cohorts, representation, aggregation):
  """The server's flat parameters, by plain loops."""
  mean, rows = basis()
  server = oracle.flatten(problem.trainable)
  for cohort in cohorts:
    decoded = []
    for indices, mask in zip(cohort.indices, cohort.mask, strict=True):
      trained = oracle.local_sgd(problem, server, indices, mask, RATE, 0.9)
      sent = server - trained if representation == "delta" else trained
      latent = np.array([row @ (sent - mean) for row in rows])
      arrived = mean + sum(x * row for x, row in zip(latent, rows, strict=True))
      decoded.append(server - arrived if representation == "delta" else arrived)
    weights = cohort.weights.astype(np.float64)
    shares = weights / weights.sum()
    if aggregation == "sum":
      shares = np.ones(len(decoded))
    moved = server.copy()
    for share, state in zip(shares, decoded, strict=True):
      moved += share * (state - server)
    if aggregation == "product":
      product = np.zeros((6, 4))
      for share, state in zip(shares, decoded, strict=True):
        product += share * state[:12].reshape(6, 2) @ state[12:20].reshape(2, 4)
      u, s, v = np.linalg.svd(product)
      u, s, v = u[:, :2], s[:2], v[:2]
      sign = np.array([x[np.abs(x).argmax()] for x in u.T])
      sign = np.sign(sign)
      moved[:12] = (u * sign).ravel()
      moved[12:20] = ((s * sign)[:, None] * v).ravel()
    server = moved
  return server


@pytest.mark.parametrize("representation", ["delta", "state"])
@pytest.mark.parametrize(
  ("aggregation", "make"), [("mean", MEAN), ("sum", SUM), ("product", PRODUCT)]
)
def test_faf_is_its_oracle_in_float64(
  problem, oracle, representation, aggregation, make
):
  # Clients weighted by their examples, through a codec that loses most.
  cohorts = problem.cohorts(4)
  with jax.enable_x64(True):
    *_, got = play(problem, make, cohorts, representation)
  expected = np_faf(problem, oracle, cohorts, representation, aggregation)
  got = oracle.flatten(got)
  assert got.dtype == np.float64
  # A decomposition errs by the product over its gap.
  bound = 1e-9 if aggregation == "product" else 1e-12
  np.testing.assert_allclose(got, expected, rtol=bound, atol=bound / 100)


def fed_avg_states(problem, cohorts):
  algorithm = fed_avg.fed_avg(
    problem.loss_fn, SGD, optax.sgd(1.0), placement=placements.ALONE
  )
  step, states = jax.jit(algorithm.round), []
  state = algorithm.init(problem.trainable)
  for cohort in cohorts:
    state, _ = step(state, problem.frozen, problem.examples, cohort, KEY)
    states.append(jax.device_get(state.trainable))
  return states


@pytest.mark.parametrize("representation", ["delta", "state"])
def test_a_codec_that_loses_nothing_is_fed_avg(problem, representation):
  # Bit for bit for both: start - (start - update) is the update again, except
  # for ties of rounding.
  cohorts = problem.cohorts(4)
  expected = fed_avg_states(problem, cohorts)
  got = play(problem, MEAN, cohorts, representation, True)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_of_one_client_it_is_plain_local_training(problem, oracle):
  # Equal up to the rounding of an update.
  cohort = problem.cohort(2)
  (got,) = play(problem, MEAN, [cohort], "delta", True)
  start = oracle.flatten(problem.trainable)
  alone = cohort.indices[0], cohort.mask[0]
  expected = oracle.local_sgd(problem, start, *alone, RATE, 0.9)
  np.testing.assert_allclose(oracle.flatten(got), expected, atol=1e-6)


def test_the_sum_is_as_many_means_as_there_are_clients(problem):
  # The sum is that of the updates, not that of the factors.
  cohort = problem.cohort(1, 3, 5)
  uniform = cohort._replace(weights=np.ones(3, np.float32))
  start = problem.trainable
  (mean,) = play(problem, MEAN, [uniform], "delta", True)
  (total,) = play(problem, SUM, [cohort], "delta", True)
  for name in start:
    moved = 3 * (mean[name] - start[name])
    np.testing.assert_allclose(total[name] - start[name], moved, atol=1e-6)


def test_the_mean_of_products_is_not_the_product_of_means(problem):
  # For one client the two are the same.
  def products(*chosen):
    cohort = problem.cohort(*chosen)
    for make in (MEAN, PRODUCT):
      (got,) = play(problem, make, [cohort], "delta", True)
      yield got["a"] @ got["b"]

  mean, product = products(1, 3)
  assert np.abs(mean - product).max() > 1e-4 * np.abs(product).max()
  np.testing.assert_allclose(*products(3), atol=1e-6)


@pytest.mark.parametrize("make", [MEAN, PRODUCT])
def test_another_representation_is_refused(problem, make):
  with pytest.raises(ValueError, match="'delta' or 'state', got 'gradient'"):
    compose(make, problem.loss_fn, "gradient")
