import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import measures
from fedjax_llm.compression import base
from fedjax_llm.federated import channels, fidelity
from fedjax_llm.federated.algorithms import fed_avg
from tests import placements

KEY = jax.random.key(1)
RNG = np.random.default_rng(0)
SENT = RNG.normal(1, 1, (5, 400)).astype(np.float32)
ARRIVED = (0.3 * SENT + RNG.normal(0, 0.5, SENT.shape)).astype(np.float32)


def cosines(sent, arrived, weights):
  shares = jax.vmap(fidelity.share)(
    jnp.asarray(sent), jnp.asarray(arrived), jnp.asarray(weights)
  )
  total = jax.tree.map(lambda x: x.sum(0), shares)
  return {name: float(x) for name, x in fidelity.cosines(total).items()}


def np_cosines(sent, arrived, weights):
  """By their definition, in float64, with everything in memory."""
  u, r = sent.astype(np.float64), arrived.astype(np.float64)
  p = (weights / weights.sum())[:, None]
  mean_u, mean_r = (p * u).sum(0), (p * r).sum(0)
  own_u, own_r = np.sqrt(p) * (u - mean_u), np.sqrt(p) * (r - mean_r)
  cosine = lambda x, y: (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
  return {
    "update_cosine": cosine(mean_u, mean_r),
    "innovation_cosine": cosine(own_u, own_r),
  }


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [3, 0, 1, 7, 2]])
def test_the_sums_are_of_the_definition(weights):
  weights = np.array(weights, np.float32)
  got, expected = (f(SENT, ARRIVED, weights) for f in (cosines, np_cosines))
  # Energies lose a digit or two to the mean's.
  assert got == pytest.approx(expected, abs=1e-5)


def test_the_cosine_of_the_mean_is_that_of_the_measures():
  got = cosines(SENT, ARRIVED, np.ones(5, np.float32))
  expected = measures.cosine(SENT.mean(0), ARRIVED.mean(0))
  assert got["update_cosine"] == pytest.approx(float(expected), abs=1e-6)


def test_what_arrives_whole_has_cosines_of_one():
  got = cosines(SENT, SENT, np.ones(5, np.float32))
  assert got == pytest.approx(
    {"update_cosine": 1, "innovation_cosine": 1}, abs=1e-5
  )


def test_a_decoder_that_ignores_its_message_transmits_nothing():
  # Exactly: what is left of sums that cancel must not look like something.
  arrived = np.broadcast_to(SENT.mean(0), SENT.shape)
  got = cosines(SENT, arrived, np.array([1, 3, 1, 7, 2], np.float32))
  assert got["innovation_cosine"] == 0
  assert got["update_cosine"] > 0.9


@pytest.mark.parametrize("arrived", [SENT, np.zeros_like(SENT)])
def test_there_is_nothing_to_compare_of_nobody(arrived):
  got = cosines(SENT, arrived, np.zeros(5, np.float32))
  assert got == {"update_cosine": 0, "innovation_cosine": 0}


def test_one_client_has_nothing_of_its_own():
  got = cosines(SENT[:1], ARRIVED[:1], np.ones(1, np.float32))
  assert got["innovation_cosine"] == 0


def test_tiny_updates_have_cosines_too():
  small = np.float32(1e-12)
  got = cosines(small * SENT, small * ARRIVED, np.ones(5, np.float32))
  expected = np_cosines(SENT, ARRIVED, np.ones(5))
  assert got == pytest.approx(expected, abs=1e-5)


UPLOAD = channels.Channel(upload=compression.stochastic_uniform(2))


def play(problem, keep_metrics, **parts):
  algorithm = fed_avg.fed_avg(
    problem.loss_fn,
    optax.sgd(0.05, momentum=0.9),
    optax.sgd(1.0),
    channel=UPLOAD,
    **parts,
  )
  step = jax.jit(
    lambda *arguments: algorithm.round(*arguments)[: 1 + keep_metrics]
  )
  state, metrics = algorithm.init(problem.trainable), []
  for cohort in problem.cohorts(4):
    state, *line = step(state, problem.frozen, problem.examples, cohort, KEY)
    metrics += line
  return jax.device_get((state, metrics))


def test_the_cosines_change_no_bit_of_the_parameters(problem):
  # Without metrics the compiler leaves out what only they need.
  with_them, _ = play(problem, True, placement=placements.ALONE)
  without, _ = play(problem, False, placement=placements.ALONE)
  jax.tree.map(np.testing.assert_array_equal, with_them, without)


def test_the_placement_of_clients_changes_only_rounding(problem):
  _, expected = play(problem, True, placement=placements.ALONE)
  for where in ((1, placements.EVERYBODY), (2, 2)):
    parts = {"placement": placements.on(*where)}
    _, metrics = play(problem, True, **parts)
    for got, line in zip(metrics, expected, strict=True):
      for name in ("update_cosine", "innovation_cosine"):
        assert 0 < line[name] < 1
        assert got[name] == pytest.approx(line[name], abs=1e-4)


def test_a_client_that_is_left_out_is_in_no_cosine(problem):
  algorithm = fed_avg.fed_avg(
    problem.loss_fn, optax.sgd(0.05), optax.sgd(1.0), placement=placements.ALONE
  )
  step = jax.jit(algorithm.round)
  cohort = problem.cohort(3, 4)
  examples = jax.tree.map(np.copy, problem.examples)
  examples["x"][cohort.indices[1][cohort.mask[1]]] = np.nan
  state = algorithm.init(problem.trainable)
  _, metrics = step(state, problem.frozen, examples, cohort, KEY)
  assert metrics["update_cosine"] == pytest.approx(1)
  assert metrics["innovation_cosine"] == 0  # Of one client.


def test_a_codec_that_loses_what_is_a_client_s_own_is_seen(problem):
  def of_one_for_all(vector, key):
    del key
    return base.Dense(jnp.ones_like(vector))

  constant = base.stateless(of_one_for_all, lambda payload: payload.values)
  for codec, is_seen in ((constant, True), (compression.sign(), False)):
    algorithm = fed_avg.fed_avg(
      problem.loss_fn,
      optax.sgd(0.05),
      optax.sgd(1.0),
      channel=channels.Channel(upload=codec),
      placement=placements.ALONE,
    )
    _, metrics = jax.jit(algorithm.round)(
      algorithm.init(problem.trainable),
      problem.frozen,
      problem.examples,
      problem.cohort(2, 3, 5),
      KEY,
    )
    assert (metrics["innovation_cosine"] < 0.05) == is_seen


@pytest.mark.parametrize(
  ("cosines", "spoken"),
  [
    ([0.0, 0.01, -0.02], 1),
    ([0.0] * 9, 1),
    ([0.0, 0.01], 0),
    ([0.0, None, 0.01], 0),
    ([0.0, 0.0, 0.3], 0),
    ([0.3, 0.2, 0.3, 0.0, 0.0], 0),
    # A codec that was fitted anew may be worse than the one before.
    ([0.6] * 9 + [0.0, 0.01, 0.0], 1),
  ],
)
def test_the_gate_speaks_once_if_nothing_arrives(cosines, spoken):
  said = []
  gate = fidelity.Gate(said.append)
  for cosine in cosines:
    gate.see(cosine)
  assert len(said) == spoken
  for text in said:
    assert "delta" in text and "scale" in text and "trellis" in text
