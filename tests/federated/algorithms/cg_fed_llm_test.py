import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import pca
from fedjax_llm.compression import base, wire
from fedjax_llm.federated import aggregators, codec_rounds
from fedjax_llm.federated.algorithms import cg_fed_llm, fed_avg

KEY = jax.random.key(4)
DEVICE = jax.devices()[0]
RATE = 0.05
SGD = optax.sgd(RATE, momentum=0.9)
ENTRIES, COMPONENTS, SETUP = 24, 9, 1000
DENSE = len(wire.dumps(base.Dense(np.zeros(ENTRIES, np.float32))))


def basis(seed=0):
  """A linear codec that loses most of a vector."""
  rng = np.random.default_rng(seed)
  rows, _ = np.linalg.qr(rng.normal(0, 1, (ENTRIES, COMPONENTS)))
  return pca.Basis(rng.normal(0, 0.01, ENTRIES), rows.T.copy())


MEAN, PRODUCT = cg_fed_llm.cg_fed_llm, cg_fed_llm.cg_fed_llm_products
SUM = functools.partial(MEAN, aggregate=aggregators.total())


@functools.cache
def compose(make, loss_fn, *, lossless=False, **knobs):
  of_codec = (lambda codec: base.identity()) if lossless else pca.pca
  optimizers = [] if make is PRODUCT else [optax.sgd(1.0)]
  algorithm = make(
    loss_fn,
    SGD,
    *optimizers,
    codec=basis(),
    compressor_of=of_codec,
    setup_bytes=SETUP,
    population=7,
    **{"clients_per_step": 1} | knobs,
  )
  return algorithm, jax.jit(algorithm.round)


def composed(problem, make, **knobs):
  """Compiled once for all tests, whether they name what is the default."""
  knobs = {"representation": "delta", "volunteers": None} | knobs
  return compose(make, problem.loss_fn, **knobs)


def play(problem, make, cohorts, state=None, **knobs):
  algorithm, step = composed(problem, make, **knobs)
  # Placed, as experiments do it: a codec that comes later is placed likewise.
  state = state or jax.device_put(algorithm.init(problem.trainable), DEVICE)
  states, metrics = [state], []
  for cohort in cohorts:
    state, line = step(
      states[-1], problem.frozen, problem.examples, cohort, KEY
    )
    states.append(state)
    metrics.append(jax.device_get(line))
  return states, metrics


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
    states, _ = play(problem, make, cohorts, representation=representation)
  expected = np_faf(problem, oracle, cohorts, representation, aggregation)
  got = oracle.flatten(states[-1].trainable)
  assert got.dtype == np.float64
  # A decomposition errs by the product over its gap.
  bound = 1e-9 if aggregation == "product" else 1e-12
  np.testing.assert_allclose(got, expected, rtol=bound, atol=bound / 100)


def fed_avg_states(problem, cohorts):
  algorithm = fed_avg.fed_avg(
    problem.loss_fn, SGD, optax.sgd(1.0), clients_per_step=1
  )
  step, state, states = jax.jit(algorithm.round), None, []
  state = algorithm.init(problem.trainable)
  for cohort in cohorts:
    state, _ = step(state, problem.frozen, problem.examples, cohort, KEY)
    states.append(jax.device_get(state.trainable))
  return states


def test_a_codec_that_loses_nothing_is_fed_avg(problem):
  # Law 1, bit for bit of both: start - (start - update) is the update again,
  # but for ties of rounding.
  cohorts = problem.cohorts(4)
  expected = fed_avg_states(problem, cohorts)
  for representation in ("delta", "state"):
    states, _ = play(
      problem, MEAN, cohorts, lossless=True, representation=representation
    )
    for got, state in zip(states[1:], expected, strict=True):
      jax.tree.map(np.testing.assert_array_equal, got.trainable, state)


def test_the_sum_is_as_many_means_as_there_are_clients(problem):
  # Law 7, of one round: updates, and not the factors they are of, add up.
  cohort = problem.cohort(1, 3, 5)
  uniform = cohort._replace(weights=np.ones(3, np.float32))
  start = problem.trainable
  of = lambda make, each: play(problem, make, [each])[0][-1].trainable
  mean, total = of(MEAN, uniform), of(SUM, cohort)
  for name in start:
    moved = 3 * (mean[name] - start[name])
    np.testing.assert_allclose(total[name] - start[name], moved, atol=1e-6)


def test_the_mean_of_products_is_not_the_product_of_means(problem):
  # Law 7.
  cohort = [problem.cohort(1, 3)]
  product = lambda tree: tree["a"] @ tree["b"]
  of = lambda make: product(
    play(problem, make, cohort, lossless=True)[0][-1].trainable
  )
  difference = np.abs(of(MEAN) - of(PRODUCT)).max()
  assert difference > 1e-4 * np.abs(of(PRODUCT)).max()
  # Of one client they are the same.
  cohort = [problem.cohort(3)]
  np.testing.assert_allclose(of(MEAN), of(PRODUCT), atol=1e-6)


def test_a_client_pays_for_the_encoder_on_its_first_visit(problem):
  # And again when there is a new one; the decoder never travels.
  visits = [problem.cohort(0, 1), problem.cohort(1, 2), problem.cohort(2, 0)]
  states, metrics = play(problem, MEAN, visits)
  down = [line["download_bytes"].tolist() for line in metrics]
  new, old = DENSE + SETUP, DENSE
  assert down == [[new, new], [old, new], [old, old]]
  latent = pca.Latent(np.zeros(COMPONENTS, np.float32), ENTRIES)
  assert metrics[0]["upload_bytes"].tolist() == [len(wire.dumps(latent))] * 2
  state = codec_rounds.refitted(states[-1], basis(1))
  _, metrics = play(problem, MEAN, [visits[0], visits[1]], state)
  down = [line["download_bytes"].tolist() for line in metrics]
  assert down == [[new, new], [old, new]]


def test_who_is_left_out_has_not_fetched_the_encoder(problem):
  cohort = problem.cohort(0, 1)
  some = cohort._replace(weights=np.array([1, 0], np.float32))
  states, _ = play(problem, MEAN, [some])
  assert states[-1].held.tolist() == [1, 0, 0, 0, 0, 0, 0]


VOLUNTEERS = (True, False, False, True, False, False, False)


@pytest.mark.parametrize("representation", ["delta", "state"])
def test_the_server_knows_what_it_decoded_and_what_is_volunteered(
  problem, oracle, representation
):
  knobs = dict(representation=representation, volunteers=VOLUNTEERS)
  cohorts = [problem.cohort(0, 1, 3), problem.cohort(1, 5)]
  states, metrics = play(problem, MEAN, cohorts, **knobs)
  start, cohort = oracle.flatten(problem.trainable), cohorts[0]
  own = [
    oracle.local_sgd(problem, start, *each, RATE, 0.9)
    for each in zip(cohort.indices, cohort.mask, strict=True)
  ]
  mean, rows = basis()
  own = np.array(own)
  expected = own if representation == "state" else start - own
  expected[1] = mean + rows.T @ (rows @ (expected[1] - mean))
  got = codec_rounds.known(states[1])
  np.testing.assert_allclose(got, expected, atol=1e-6)
  assert codec_rounds.known(states[2]).shape == (4, ENTRIES)
  # Entry by entry, beside the latent.
  latent = metrics[1]["upload_bytes"][1]
  up = [latent + DENSE, latent, latent + DENSE]
  assert metrics[0]["upload_bytes"].tolist() == up
  # A server that remembers moves as one that does not.
  plain, _ = play(problem, MEAN, cohorts, representation=representation)
  jax.tree.map(
    np.testing.assert_array_equal, plain[-1].trainable, states[-1].trainable
  )


def test_a_new_codec_compiles_nothing_and_is_used(problem):
  cohorts = problem.cohorts(4)
  states, _ = play(problem, MEAN, cohorts[:2], volunteers=VOLUNTEERS)
  algorithm, step = composed(problem, MEAN, volunteers=VOLUNTEERS)
  before = step._cache_size()
  recorded = codec_rounds.known(states[-1])
  fitted = pca.fit(jnp.array(recorded), 1)
  rows = np.zeros((COMPONENTS, ENTRIES), np.float32)
  rows[:1] = fitted.components
  state = codec_rounds.refitted(states[-1], pca.Basis(fitted.mean, rows))
  new, _ = play(problem, MEAN, cohorts[2:], state, volunteers=VOLUNTEERS)
  old, _ = play(problem, MEAN, cohorts[2:], states[-1], volunteers=VOLUNTEERS)
  assert step._cache_size() == before
  assert (new[-1].trainable["a"] != old[-1].trainable["a"]).any()


def test_the_codec_is_no_constant_of_the_program(problem):
  # A large one would be compiled in, and with a new one all over again.
  algorithm, _ = composed(problem, MEAN)
  jaxpr = jax.make_jaxpr(algorithm.round)(
    algorithm.init(problem.trainable),
    problem.frozen,
    problem.examples,
    problem.cohort(0, 4),
    KEY,
  )
  shapes = [np.shape(constant) for constant in jaxpr.consts]
  assert (COMPONENTS, ENTRIES) not in shapes


def test_a_codec_serves_under_error_feedback_and_before_a_quantiser(problem):
  def compressor_of(codec):
    return base.error_feedback(
      base.chain(pca.pca(codec), compression.uniform(8))
    )

  algorithm = MEAN(
    problem.loss_fn,
    SGD,
    optax.sgd(1.0),
    codec=basis(),
    compressor_of=compressor_of,
    setup_bytes=SETUP,
    population=7,
    clients_per_step=1,
  )
  state = algorithm.init(problem.trainable)
  state, metrics = jax.jit(algorithm.round)(
    state, problem.frozen, problem.examples, problem.cohort(2, 5), KEY
  )
  residual = state.inner.upload[0][0]
  assert residual.shape == (7, ENTRIES) and np.asarray(residual)[2].any()
  assert metrics["upload_bytes"][0] < 4 * COMPONENTS


@pytest.mark.parametrize(
  ("knobs", "message"),
  [
    ({"representation": "gradient"}, "'delta' or 'state', got 'gradient'"),
    ({"volunteers": (True, False)}, r"bool \[7\].* got shape \(2,\)"),
  ],
)
def test_what_it_is_not_made_for_is_refused(problem, knobs, message):
  for make in (MEAN, PRODUCT):
    with pytest.raises(ValueError, match=message):
      composed(problem, make, **knobs)


def test_a_codec_of_another_shape_is_refused(problem):
  states, _ = play(problem, MEAN, [])
  mean, rows = basis()
  with pytest.raises(ValueError, match="the same shapes"):
    codec_rounds.refitted(states[0], pca.Basis(mean, rows[1:]))


def test_a_server_that_keeps_nothing_knows_nothing(problem):
  states, _ = play(problem, MEAN, [])
  with pytest.raises(ValueError, match="with `volunteers`"):
    codec_rounds.known(states[0])
