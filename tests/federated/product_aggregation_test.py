"""What all methods of `product_round` have in common."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import base, wire
from fedjax_llm.federated import clients
from fedjax_llm.federated.algorithms import fed_ex_lora, flex_lora, flora
from fedjax_llm.models import lora
from tests import placements

KEY = jax.random.key(6)
SGD = optax.sgd(0.05, momentum=0.9)
SCALE = 1.5


@functools.cache
def compose(make, loss_fn, **knobs):
  knobs = {"population": 7, "placement": placements.ALONE} | knobs
  algorithm = make(loss_fn, SGD, **knobs)
  return algorithm, jax.jit(algorithm.round)


def play(problem, make, cohorts, **knobs):
  """The states, the first one too, and the metrics."""
  algorithm, step = compose(make, problem.scaled_loss_fn, **knobs)
  states, metrics = [algorithm.init(problem.trainable)], []
  frozen = {"kernel": problem.frozen["w"]}
  for cohort in cohorts:
    state, line = step(states[-1], frozen, problem.examples, cohort, KEY)
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(line))
  return states, metrics


def message(count):
  return len(wire.dumps(base.Dense(np.zeros(count, np.float32))))


# The toy problem: factors of one rank, the head, a dense delta.
ONE, HEAD, DENSE = 6 + 4, 4, 6 * 4


def sizes(*counts):
  return [sum(map(message, counts)), sum(counts)]


def test_a_client_fetches_what_it_missed_of_the_residual(problem):
  # Two clients a round: the residual of a round is the factors of one of them,
  # 20 numbers, smaller than the 24 of a delta; that of two rounds is larger.
  visits = [(0, 1), (0, 2), (3, 2), (0, 1), (0, 1)]
  cohorts = [problem.cohort(*each) for each in visits]
  _, metrics = play(problem, fed_ex_lora.fed_ex_lora, cohorts, scale=SCALE)
  factors = 2 * ONE + HEAD
  none, once = sizes(factors), sizes(factors, 2 * ONE)
  more = sizes(factors, DENSE)
  expected = [
    [none, none],
    [once, once],
    [more, once],
    [more, more],
    [once] * 2,
  ]
  got = [
    np.transpose([x["download_bytes"], x["download_entries"]]).tolist()
    for x in metrics
  ]
  assert got == expected
  assert [x["upload_bytes"].tolist() for x in metrics] == [
    [message(factors)] * 2
  ] * 5


def test_a_residual_of_many_clients_travels_as_a_dense_matrix(problem):
  # The factors of two of three clients are 40 numbers.
  cohorts = [problem.cohort(0, 1, 2)] * 2
  _, metrics = play(problem, fed_ex_lora.fed_ex_lora, cohorts, scale=SCALE)
  assert (
    metrics[1]["download_bytes"].tolist()
    == [message(2 * ONE + HEAD) + message(DENSE)] * 3
  )


def test_the_mean_of_one_client_has_no_residual(problem):
  cohorts = [problem.cohort(2)] * 2
  states, metrics = play(problem, fed_ex_lora.fed_ex_lora, cohorts, scale=SCALE)
  assert not states[-1].residual["delta"].any()
  assert metrics[1]["download_bytes"].tolist() == [message(2 * ONE + HEAD)]


def test_stacks_are_the_factors_of_those_who_came_at_their_ranks(problem):
  # Clients 0 and 2 are of rank 1, client 1 of rank 2. New factors are free.
  cohorts = [problem.cohort(0, 2), problem.cohort(0, 1), problem.cohort(0, 1)]
  _, metrics = play(problem, flora.flora, cohorts, scale=SCALE, ranks=(1, 2))
  assert metrics[0]["download_bytes"].tolist() == [message(HEAD)] * 2
  stack = message(HEAD) + 2 * message(ONE)
  assert metrics[1]["download_bytes"].tolist() == [stack] * 2
  # 30 numbers of the round before are more than a dense delta.
  dense = message(HEAD) + message(DENSE)
  assert metrics[2]["download_bytes"].tolist() == [dense] * 2
  up = [message(ONE + HEAD), message(2 * ONE + HEAD)]
  assert metrics[2]["upload_bytes"].tolist() == up


def test_who_is_left_out_has_not_fetched_anything(problem):
  cohort = problem.cohort(0, 1, 2)
  some = cohort._replace(weights=np.array([1, 1, 0], np.float32))
  states, _ = play(problem, fed_ex_lora.fed_ex_lora, [some, some], scale=SCALE)
  missed = states[2].missed[:, 0].tolist()
  once, more = message(2 * ONE), message(DENSE)
  assert missed == [once, once, more, more, more, more, more]


@pytest.mark.parametrize(
  ("make", "knobs"),
  [(fed_ex_lora.fed_ex_lora, {}), (flora.flora, {"ranks": (1, 2)})],
)
def test_a_round_of_nobody_changes_only_its_number(problem, make, knobs):
  cohort = problem.cohort(0, 1)
  nobody = cohort._replace(weights=np.zeros(2, np.float32))
  states, _ = play(problem, make, [cohort, nobody], scale=SCALE, **knobs)
  assert int(states[2].round) == 2
  same = states[2]._replace(round=states[1].round)
  jax.tree.map(np.testing.assert_array_equal, same, states[1])


@pytest.mark.parametrize("make", [fed_ex_lora.fed_ex_lora, flora.flora])
def test_a_residual_of_2_gib_is_refused_before_it_is_made(problem, make):
  # Factors of 240 kB whose product has 3.6 GB.
  wide = {"a": jnp.zeros((30_000, 1)), "b": jnp.zeros((1, 30_000))}
  algorithm = make(problem.loss_fn, SGD, scale=1.0, population=2)
  with pytest.raises(ValueError, match="below 2 GiB, got one of 36002400"):
    algorithm.init({"dense": wide})


@pytest.mark.parametrize("make", [fed_ex_lora.fed_ex_lora, flora.flora])
def test_a_residual_needs_the_number_of_clients(problem, make):
  with pytest.raises(ValueError, match="population"):
    make(problem.loss_fn, SGD, scale=1.0, population=None)


def test_a_memory_of_uploads_needs_the_number_of_clients(problem):
  algorithm = flex_lora.flex_lora(
    problem.loss_fn,
    SGD,
    ranks=(2,),
    upload=compression.error_feedback(compression.top_k(0.5)),
  )
  with pytest.raises(ValueError, match="population"):
    algorithm.init(problem.trainable)


@pytest.mark.parametrize(
  "make",
  [
    functools.partial(fed_ex_lora.fed_ex_lora, scale=1.0, population=7),
    functools.partial(flex_lora.flex_lora, ranks=(2,)),
  ],
)
def test_what_has_no_factors_is_refused(problem, make):
  algorithm = make(problem.loss_fn, SGD)
  with pytest.raises(ValueError, match="factors a and b"):
    algorithm.init({"head": problem.trainable["head"]})


# Layers stacked and nested, as a model has them: y = x (w + s a b) in each.
RNG = np.random.default_rng(8)
DRAW = lambda *shape: RNG.normal(0, 0.4, shape).astype(np.float32)
STACKED = {"layers": {"q": {"a": DRAW(2, 6, 4), "b": DRAW(2, 4, 4)}}}
BASE = {
  "layers": {"q": {"kernel": DRAW(2, 6, 4), "bias": DRAW(2, 4)}},
  "norm": {"scale": DRAW(6)},
}
ROWS = {"x": DRAW(9, 6), "y": DRAW(9, 2, 4)}


def effective(trainable, frozen):
  return lora.merge(frozen, trainable, SCALE)["layers"]["q"]["kernel"]


def stacked_loss_fn(trainable, frozen, examples, mask, key):
  del key
  y = jnp.einsum("ni,lio->nlo", examples["x"], effective(trainable, frozen))
  losses = ((y - examples["y"]) ** 2).sum((1, 2))
  return jnp.where(mask, losses, 0).sum(), mask.sum()


METHODS = {
  "FedEx-LoRA": (fed_ex_lora.fed_ex_lora, {"scale": SCALE}),
  "FedEx-LoRA weighted": (
    fed_ex_lora.fed_ex_lora,
    {"scale": SCALE, "weighted": True},
  ),
  "FLoRA": (flora.flora, {"scale": SCALE, "ranks": (1, 4)}),
  # Two clients of rank 1 and one of rank 2 are no more than rank 4.
  "FlexLoRA": (flex_lora.flex_lora, {"ranks": (1, 2)}),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_the_mean_of_the_clients_models(name):
  # Exactly, up to rounding: of stacked layers, and of different ranks.
  make, knobs = METHODS[name]
  algorithm, step = compose(make, stacked_loss_fn, **knobs)
  rows = np.arange(9, dtype=np.int32).reshape(3, 1, 3)
  weights = np.array([1, 3, 2], np.float32)
  cohort = clients.Cohort(
    np.array([4, 1, 2], np.int32), rows, np.ones(rows.shape, bool), weights
  )

  def model(weights):
    state = algorithm.init(STACKED)
    each = cohort._replace(weights=weights)
    state, _ = step(state, BASE, ROWS, each, KEY)
    residual = algorithm.residual and algorithm.residual(state)
    frozen = BASE if residual is None else lora.add(BASE, residual)
    return np.asarray(effective(state.trainable, frozen))

  alone = [model(weights * (np.arange(3) == i)) for i in range(3)]
  p = np.ones(3) if name == "FedEx-LoRA" else weights
  expected = sum(x * y for x, y in zip(p / p.sum(), alone, strict=True))
  assert max(abs(x - expected).max() for x in alone) > 0.01
  np.testing.assert_allclose(model(weights), expected, atol=1e-5)
