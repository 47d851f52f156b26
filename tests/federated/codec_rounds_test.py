"""Rounds with a codec in their state, by the example of CG-FedLLM's."""

import functools

import jax
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import pca
from fedjax_llm.compression import base, wire
from fedjax_llm.federated import codec_rounds
from fedjax_llm.federated.algorithms import cg_fed_llm, fed_ex_lora
from tests import placements

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
  mean = rng.normal(0, 0.01, ENTRIES)
  return pca.Basis(np.float32(mean), np.float32(rows.T))


@functools.cache
def compose(
  loss_fn, representation="delta", volunteers=None, compressor_of=pca.pca
):
  """Compiled once for all tests."""
  algorithm = cg_fed_llm.cg_fed_llm(
    loss_fn,
    SGD,
    optax.sgd(1.0),
    codec=basis(),
    compressor_of=compressor_of,
    setup_bytes=SETUP,
    population=7,
    representation=representation,
    volunteers=volunteers,
    placement=placements.ALONE,
  )
  return algorithm, jax.jit(algorithm.round)


def play(problem, cohorts, *knobs, state=None):
  algorithm, step = compose(problem.loss_fn, *knobs)
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


def test_a_client_pays_for_the_encoder_on_its_first_visit(problem):
  # And again when there is a new one; the decoder never travels.
  visits = [problem.cohort(0, 1), problem.cohort(1, 2), problem.cohort(2, 0)]
  states, metrics = play(problem, visits)
  down = [line["download_bytes"].tolist() for line in metrics]
  new, old = DENSE + SETUP, DENSE
  assert down == [[new, new], [old, new], [old, old]]
  latent = pca.Latent(np.zeros(COMPONENTS, np.float32), ENTRIES)
  assert metrics[0]["upload_bytes"].tolist() == [len(wire.dumps(latent))] * 2
  state = codec_rounds.refitted(states[-1], basis(1))
  _, metrics = play(problem, visits[:2], state=state)
  down = [line["download_bytes"].tolist() for line in metrics]
  assert down == [[new, new], [old, new]]


def test_who_is_left_out_has_not_fetched_the_encoder(problem):
  cohort = problem.cohort(0, 1)
  some = cohort._replace(weights=np.array([1, 0], np.float32))
  states, _ = play(problem, [some])
  assert states[-1].held.tolist() == [1, 0, 0, 0, 0, 0, 0]


VOLUNTEERS = (True, False, False, True, False, False, False)


@pytest.mark.parametrize("representation", ["delta", "state"])
def test_the_server_knows_what_it_decoded_and_what_is_volunteered(
  problem, oracle, representation
):
  cohorts = [problem.cohort(0, 1, 3), problem.cohort(1, 5)]
  states, metrics = play(problem, cohorts, representation, VOLUNTEERS)
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
  plain, _ = play(problem, cohorts, representation)
  jax.tree.map(
    np.testing.assert_array_equal, plain[-1].trainable, states[-1].trainable
  )


def test_a_new_codec_compiles_nothing_and_is_used(problem):
  cohorts, knobs = problem.cohorts(4), ("delta", VOLUNTEERS)
  states, _ = play(problem, cohorts[:2], *knobs)
  _, step = compose(problem.loss_fn, *knobs)
  before = step._cache_size()
  recorded = codec_rounds.known(states[-1])
  fitted = pca.fit(recorded, 1)
  rows = np.zeros((COMPONENTS, ENTRIES), np.float32)
  rows[:1] = fitted.components
  state = codec_rounds.refitted(states[-1], pca.Basis(fitted.mean, rows))
  new, _ = play(problem, cohorts[2:], *knobs, state=state)
  old, _ = play(problem, cohorts[2:], *knobs, state=states[-1])
  assert step._cache_size() == before
  assert (new[-1].trainable["a"] != old[-1].trainable["a"]).any()


def test_the_codec_is_no_constant_of_the_program(problem):
  # A large one would be compiled in, and with a new one all over again.
  algorithm, _ = compose(problem.loss_fn)
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
      base.chain(pca.pca(codec), compression.stochastic_uniform(8))
    )

  cohort = problem.cohort(2, 5)
  states, metrics = play(problem, [cohort], "delta", None, compressor_of)
  residual = states[-1].inner.upload[0][0]
  assert residual.shape == (7, ENTRIES) and np.asarray(residual)[2].any()
  assert metrics[0]["upload_bytes"][0] < 4 * COMPONENTS


def test_a_codec_of_another_shape_is_refused(problem):
  states, _ = play(problem, [])
  mean, rows = basis()
  with pytest.raises(ValueError, match="the same shapes"):
    codec_rounds.refitted(states[0], pca.Basis(mean, rows[1:]))


def test_what_a_method_adds_to_the_base_model_is_not_lost(problem):
  parts = dict(scale=1.5, population=7)
  alone = fed_ex_lora.fed_ex_lora(problem.scaled_loss_fn, SGD, **parts)
  coded = codec_rounds.with_codec(
    lambda upload: fed_ex_lora.fed_ex_lora(
      problem.scaled_loss_fn, SGD, upload=upload, **parts
    ),
    codec=(),
    compressor_of=lambda nothing: base.identity(),
    setup_bytes=0,
    population=7,
  )
  residuals, frozen = [], {"kernel": problem.frozen["w"]}
  for algorithm in (alone, coded):
    state = algorithm.init(problem.trainable)
    for cohort in problem.cohorts(2):
      state, _ = jax.jit(algorithm.round)(
        state, frozen, problem.examples, cohort, KEY
      )
    residuals.append(jax.device_get(algorithm.residual(state)))
  jax.tree.map(np.testing.assert_array_equal, *residuals)
  assert max(abs(x).max() for x in jax.tree.leaves(residuals[0])) > 0


def test_a_server_that_keeps_nothing_knows_nothing(problem):
  states, _ = play(problem, [])
  with pytest.raises(ValueError, match="with `volunteers`"):
    codec_rounds.known(states[0])


def test_volunteers_that_are_not_of_the_population_are_refused(problem):
  with pytest.raises(ValueError, match=r"bool \[7\].* got shape \(2,\)"):
    compose(problem.loss_fn, "delta", (True, False))
