import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import base, wire
from fedjax_llm.federated import channels
from fedjax_llm.federated.algorithms import fed_avg, flasc, freezing
from tests import placements

KEY = jax.random.key(3)
SGD = optax.sgd(0.05, momentum=0.9)
REPLACE = optax.sgd(1.0)
ADAMW = flasc.server_adamw(0.05)
# Where the factors are in the flat vector of the oracle.
PARTS = {"a": slice(0, 12), "b": slice(12, 20), "head": slice(20, 24)}


@functools.cache
def compose(make, loss_fn, server):
  algorithm = make(loss_fn, SGD, server, placement=placements.ALONE)
  return algorithm, jax.jit(algorithm.round)


def run(problem, make, server, cohorts, state=None):
  """The states before and after each round, and the last metrics."""
  algorithm, step = compose(make, problem.loss_fn, server)
  states = [algorithm.init(problem.trainable) if state is None else state]
  metrics = None
  for cohort in cohorts:
    state, metrics = step(
      states[-1], problem.frozen, problem.examples, cohort, KEY
    )
    states.append(state)
  return states, metrics


def local_sgd(problem, oracle, flat, indices, mask, trained):
  """Momentum 0.9, rate 0.05, of the parts that are trained."""
  chosen = np.zeros(flat.size)
  for name in trained:
    chosen[PARTS[name]] = 1
  velocity = np.zeros_like(flat)
  for rows, real in zip(indices, mask, strict=True):
    own = rows[real]
    if own.size == 0:
      continue
    total = np.zeros_like(flat)
    for row in own:
      x, y = problem.examples["x"][row], problem.examples["y"][row]
      total += oracle.gradient(flat, problem.frozen["w"], x, y)
    velocity = 0.9 * velocity + chosen * total / own.size
    flat = flat - 0.05 * velocity
  return flat


ALTERNATING = (("b", "head"), ("a", "head"))


@pytest.mark.parametrize(
  ("make", "turns"),
  [
    (freezing.ffa_lora, [("b", "head")]),
    (freezing.linear_probe, [("head",)]),
    (freezing.ro_lora, ALTERNATING),
  ],
)
def test_methods_are_their_oracles_in_float64(problem, oracle, make, turns):
  # Unequal clients; momentum only for the trained part; one AdamW for each
  # part, which waits while the part is frozen.
  cohorts = problem.cohorts(4)
  flat = oracle.flatten(problem.trainable)
  servers = {name: oracle.adamw(0.05) for name in PARTS}
  expected = []
  for number, cohort in enumerate(cohorts):
    trained = turns[number % len(turns)]
    update = np.zeros_like(flat)
    for _, indices, mask, weight in zip(*cohort, strict=True):
      after = local_sgd(problem, oracle, flat, indices, mask, trained)
      update += np.float64(weight) * (flat - after)
    update /= cohort.weights.sum()
    flat = flat.copy()
    for name in trained:
      here = PARTS[name]
      flat[here] = servers[name](flat[here], update[here])
    expected.append(flat)
  with jax.enable_x64(True):
    states, _ = run(problem, make, ADAMW, cohorts)
    got = [oracle.flatten(state.trainable) for state in states[1:]]
  assert got[0].dtype == np.float64
  np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def products(problem, make, state):
  """The product after a round of three clients, and the mean of theirs."""
  cohort = problem.cohort(2, 5, 3)

  def product(*weights):
    weighted = cohort._replace(weights=np.array(weights, np.float32))
    states, _ = run(problem, make, REPLACE, [weighted], state)
    after = jax.device_get(states[-1].trainable)
    return np.float64(after["a"]) @ np.float64(after["b"])

  alone = [product(*row) for row in np.eye(3)]
  return product(1, 1, 1), sum(alone) / 3


@pytest.mark.parametrize(
  ("make", "is_exact"),
  [
    (freezing.ffa_lora, True),
    (freezing.ro_lora, True),
    (fed_avg.fed_avg, False),
  ],
)
@pytest.mark.parametrize("rounds", [1, 2])
def test_one_factor_at_a_time_is_aggregated_exactly(
  problem, make, is_exact, rounds
):
  # If one factor is trained, the mean of the products is the product of the
  # means. If both are trained, it is not.
  before, _ = run(problem, make, REPLACE, problem.cohorts(rounds))
  together, mean = products(problem, make, before[-1])
  moved = abs(
    together - before[-1].trainable["a"] @ before[-1].trainable["b"]
  ).max()
  assert moved > 1e-3
  # Float32 of numbers below one.
  assert (abs(together - mean).max() < 1e-6) == is_exact


def dense(entries):
  return len(wire.dumps(base.Dense(np.zeros(entries, np.float32))))


def test_ffa_lora_never_moves_or_sends_a(problem):
  states, metrics = run(problem, freezing.ffa_lora, ADAMW, problem.cohorts(3))
  start, end = states[0].trainable, states[-1].trainable
  np.testing.assert_array_equal(start["a"], end["a"])
  assert not np.array_equal(start["b"], end["b"])
  for name in ("download_bytes", "upload_bytes"):
    assert metrics[name].tolist() == [dense(8 + 4)] * 3


def test_ffa_lora_of_flasc_is_flasc_of_b(problem):
  # By hand: FLASC of a model whose `a` is among what is frozen.
  settings = dict(download_density=0.75, upload_density=0.25)
  of_flasc = functools.partial(flasc.flasc, **settings)
  make = functools.partial(freezing.ffa_lora, make=of_flasc)
  cohorts = problem.cohorts(3)
  states, metrics = run(problem, make, ADAMW, cohorts)

  def loss_fn(trainable, frozen, *arguments):
    factors = {"a": frozen["a"], **trainable}
    return problem.loss_fn(factors, frozen, *arguments)

  factors = dict(problem.trainable)
  frozen = problem.frozen | {"a": jnp.asarray(factors.pop("a"))}
  other = problem._replace(loss_fn=loss_fn, trainable=factors, frozen=frozen)
  by_hand = functools.partial(flasc.flasc, **settings)
  expected, sent = run(other, by_hand, ADAMW, cohorts)
  for name in ("b", "head"):
    np.testing.assert_array_equal(
      states[-1].trainable[name], expected[-1].trainable[name]
    )
  jax.tree.map(np.testing.assert_array_equal, metrics, sent)


def test_a_linear_probe_moves_and_sends_the_head_alone(problem):
  states, metrics = run(
    problem, freezing.linear_probe, ADAMW, problem.cohorts(2)
  )
  start, end = states[0].trainable, states[-1].trainable
  for name in ("a", "b"):
    np.testing.assert_array_equal(start[name], end[name])
  assert not np.array_equal(start["head"], end["head"])
  for name in ("download_bytes", "upload_bytes"):
    assert metrics[name].tolist() == [dense(4)] * 3


def test_a_linear_probe_of_a_model_without_a_head_is_refused(problem):
  algorithm, _ = compose(freezing.linear_probe, problem.loss_fn, REPLACE)
  factors = {name: problem.trainable[name] for name in "ab"}
  with pytest.raises(ValueError, match="take a classifier"):
    algorithm.init(factors)


def test_ro_lora_trains_b_then_a_and_uploads_no_more(problem):
  cohorts = problem.cohorts(3)
  states, _ = run(problem, freezing.ro_lora, ADAMW, cohorts)
  kinds = ("a", "b", None)
  for number, (before, after) in enumerate(
    zip(states[:-1], states[1:], strict=True)
  ):
    trains, waits = "ba" if number % 2 == 0 else "ab"
    moved = {
      name: not np.array_equal(before.trainable[name], after.trainable[name])
      for name in PARTS
    }
    assert moved == {trains: True, waits: False, "head": True}
    # The waiting factor's moments and steps are what they were.
    i = kinds.index(waits)
    jax.tree.map(
      np.testing.assert_array_equal, before.optimizer[i], after.optimizer[i]
    )
    _, metrics = run(problem, freezing.ro_lora, ADAMW, cohorts[:1], before)
    assert metrics["download_bytes"].tolist() == [dense(24)] * 3
    entries = 4 + {"a": 12, "b": 8}[trains]
    assert metrics["upload_bytes"].tolist() == [dense(entries)] * 3


def test_what_ro_lora_uploads_can_be_compressed_further(problem):
  channel = channels.Channel(upload=compression.top_k(0.5))
  make = functools.partial(freezing.ro_lora, channel=channel)
  states, metrics = run(problem, make, REPLACE, problem.cohorts(1))
  assert metrics["upload_entries"].tolist() == [6] * 3
  start, end = states[0].trainable, states[-1].trainable
  np.testing.assert_array_equal(start["a"], end["a"])
  assert np.count_nonzero(end["b"])


@pytest.mark.parametrize("hidden", [4, 6])
def test_an_upload_with_memory_is_refused_by_ro_lora(problem, hidden):
  # With 6 hidden units `a` and `b` are equally large, and so would residuals
  # be: what was left of one would be added to the other.
  upload = compression.error_feedback(compression.top_k(0.5))
  algorithm = freezing.ro_lora(
    problem.loss_fn,
    SGD,
    REPLACE,
    channel=channels.Channel(upload=upload),
    population=problem.population,
  )
  square = {"a": np.ones((6, 2)), "b": np.ones((2, hidden))}
  with pytest.raises(ValueError, match="without memory.*Take it out of error_"):
    algorithm.init(square)
