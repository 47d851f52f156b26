import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import clients
from fedjax_llm.federated.algorithms import fed_avg, flasc, het_lora
from tests import placements

KEY = jax.random.key(3)
RATE, PENALTY = 0.05, 0.5
SGD = optax.sgd(RATE, momentum=0.9)
REPLACE = optax.sgd(1.0)
ADAMW = flasc.server_adamw(0.1)
RANKS = (1, 2)


@functools.cache
def compose(make, loss_fn, server, **knobs):
  knobs = {
    "ranks": RANKS,
    "population": 7,
    "placement": placements.ALONE,
  } | knobs
  algorithm = make(loss_fn, SGD, server, **knobs)
  return algorithm, jax.jit(algorithm.round)


def play(problem, make, server, cohorts, **knobs):
  """The last state, and all metrics."""
  algorithm, step = compose(make, problem.loss_fn, server, **knobs)
  state, metrics = algorithm.init(problem.trainable), []
  for cohort in cohorts:
    state, line = step(state, problem.frozen, problem.examples, cohort, KEY)
    metrics.append(jax.device_get(line))
  return jax.device_get(state), metrics


def parts(flat):
  a, b, head = np.split(flat, [12, 20])
  return a.reshape(6, 2), b.reshape(2, 4), head


def cut_off(flat, rank):
  a, b, head = (np.copy(x) for x in parts(flat))
  a[:, rank:], b[rank:] = 0, 0
  return np.concatenate([a.ravel(), b.ravel(), head])


def np_tail(flat, first):
  """The product of the norms of the last ranks, and its gradient."""
  a, b, _ = parts(flat)
  of_a = np.sqrt(sum(x * x for x in a[:, first:].ravel()))
  of_b = np.sqrt(sum(x * x for x in b[first:].ravel()))
  slope_a, slope_b = np.zeros_like(a), np.zeros_like(b)
  if of_a > 0 and of_b > 0:
    slope_a[:, first:] = of_b * a[:, first:] / of_a
    slope_b[first:] = of_a * b[first:] / of_b
  slope = np.concatenate([slope_a.ravel(), slope_b.ravel(), np.zeros(4)])
  return of_a * of_b, slope


def np_train(problem, oracle, flat, indices, mask, first):
  velocity = np.zeros_like(flat)
  for rows, real in zip(indices, mask, strict=True):
    own = rows[real]
    if own.size == 0:
      continue
    slopes = [
      oracle.gradient(
        flat,
        problem.frozen["w"],
        problem.examples["x"][row],
        problem.examples["y"][row],
      )
      for row in own
    ]
    slope = sum(slopes) / own.size + PENALTY * np_tail(flat, first)[1]
    velocity = 0.9 * velocity + slope
    flat = flat - RATE * velocity
  return flat


def test_het_lora_is_its_oracle_in_float64(problem, oracle):
  # Penalty, pruning, weights by norms, padding with zeros.
  cohorts = problem.cohorts(4, size=4)
  flat = oracle.flatten(problem.trainable)
  ranks = {client: RANKS[client % 2] for client in range(7)}
  for cohort in cohorts:
    answers, norms = [], []
    for client, indices, mask, _ in zip(*cohort, strict=True):
      rank = ranks[client]
      first = max(1, int(0.5 * rank))
      start = cut_off(flat, rank)
      trained = np_train(problem, oracle, start, indices, mask, first)
      if np_tail(trained, first)[0] < np_tail(start, first)[0]:
        ranks[client] = first
      answers.append(cut_off(trained, ranks[client]))
      a, b, _ = parts(answers[-1])
      norms.append(np.sqrt(np.sum((a @ b) ** 2)))
    flat = sum(x * y for x, y in zip(norms, answers, strict=True)) / sum(norms)
  with jax.enable_x64(True):
    state, _ = play(
      problem, het_lora.het_lora, REPLACE, cohorts, decay=0.5, penalty=PENALTY
    )
  assert {ranks[client] for client in (1, 3, 5)} == {1, 2}
  assert state.upload.tolist() == [ranks[client] for client in range(7)]
  got = oracle.flatten(state.trainable)
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-14)


def test_zero_padded_is_its_oracle_in_float64(problem, oracle):
  # An update of zero stands for the ranks that a client lacks.
  cohorts = problem.cohorts(4)
  flat, server = oracle.flatten(problem.trainable), oracle.adamw(0.1)
  for cohort in cohorts:
    update = np.zeros_like(flat)
    for client, indices, mask, _ in zip(*cohort, strict=True):
      start = cut_off(flat, RANKS[client % 2])
      trained = oracle.local_sgd(problem, start, indices, mask, RATE, 0.9)
      update += (start - trained) / len(cohort.clients)
    flat = server(flat, update)
  with jax.enable_x64(True):
    state, _ = play(problem, het_lora.zero_padded_lora, ADAMW, cohorts)
  got = oracle.flatten(state.trainable)
  np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", [SGD, optax.adamw(0.1)])
def test_ranks_that_were_not_received_are_not_trained(problem, optimizer):
  # Their gradients are zero, so nothing needs to be frozen.
  a, b = problem.trainable["a"], np.full((2, 4), 0.3)
  start = {
    "a": a * (np.arange(2) < 1),
    "b": b * (np.arange(2) < 1)[:, None],
    "head": problem.trainable["head"],
  }
  train = jax.jit(clients.local_update(problem.loss_fn, optimizer))
  cohort = problem.cohort(2)
  trained = train(
    jax.tree.map(jnp.asarray, start),
    problem.frozen,
    problem.examples,
    cohort.indices[0],
    cohort.mask[0],
    KEY,
  ).trainable
  assert not trained["a"][:, 1:].any()
  assert not trained["b"][1:].any()
  assert (trained["a"][:, 0] != start["a"][:, 0]).all()


@pytest.mark.parametrize("name", ["zero_padded_lora", "het_lora"])
def test_one_tier_is_training_at_that_rank(problem, name):
  # Equal up to rounding. The other ranks of the server stay, or become the
  # zeros of the paper's padding. All weights are equal.
  cohorts = [problem.cohort(2, order=i) for i in range(3)]
  knobs = {"decay": 1.0} if name == "het_lora" else {}
  state, _ = play(
    problem, getattr(het_lora, name), REPLACE, cohorts, ranks=(1,), **knobs
  )
  got = state.trainable
  small = {
    "a": problem.trainable["a"][:, :1],
    "b": problem.trainable["b"][:1],
    "head": problem.trainable["head"],
  }
  state, _ = play_fed_avg(problem._replace(trainable=small), cohorts)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(got["a"][:, :1], state.trainable["a"])
  close(got["b"][:1], state.trainable["b"])
  close(got["head"], state.trainable["head"])
  rest = np.zeros((6, 1)) if knobs else problem.trainable["a"][:, 1:]
  close(got["a"][:, 1:], rest)
  assert not got["b"][1:].any()


def play_fed_avg(problem, cohorts):
  algorithm = fed_avg.fed_avg(problem.loss_fn, SGD, REPLACE)
  step = jax.jit(algorithm.round)
  state, metrics = algorithm.init(problem.trainable), None
  for cohort in cohorts:
    state, metrics = step(state, problem.frozen, problem.examples, cohort, KEY)
  return jax.device_get(state), metrics


def message(count):
  return len(wire.dumps(base.Dense(np.zeros(count, np.float32))))


def test_messages_are_as_long_as_ranks_are_high(problem):
  cohort = problem.cohort(0, 1, 2)
  of_rank = [message(4 + 10), message(4 + 20)]
  expected = [of_rank[0], of_rank[1], of_rank[0]]
  for make in (het_lora.zero_padded_lora, het_lora.het_lora):
    _, (metrics,) = play(problem, make, REPLACE, [cohort])
    assert metrics["download_bytes"].tolist() == expected
    assert metrics["upload_bytes"].tolist() == expected


def test_a_client_that_prunes_itself_stays_small(problem):
  # The first round has nothing to shrink, because b is zero.
  knobs = {"decay": 0.5, "penalty": 3.0, "ranks": (2,)}
  cohorts = [problem.cohort(2, 6, order=i) for i in range(4)]
  state, metrics = play(problem, het_lora.het_lora, REPLACE, cohorts, **knobs)
  small, large = message(4 + 10), message(4 + 20)
  down = np.stack([x["download_bytes"] for x in metrics])
  up = np.stack([x["upload_bytes"] for x in metrics])
  assert down[0].tolist() == up[0].tolist() == [large, large]
  assert (up == small).any(axis=0).any()
  # What was sent small comes small from then on.
  np.testing.assert_array_equal(down[1:], up[:-1])
  assert (np.diff(up, axis=0) <= 0).all()
  assert state.upload[[0, 1, 3, 4, 5]].tolist() == [2] * 5


def test_the_loss_that_is_reported_is_without_the_penalty(problem):
  trainable = {**problem.trainable, "b": np.full((2, 4), 0.3)}
  own = problem._replace(trainable=trainable)
  cohort = own.cohort(2, 6, steps=1)
  losses = [
    play(own, het_lora.het_lora, REPLACE, [cohort], decay=0.5, penalty=x)[1]
    for x in (0.0, PENALTY)
  ]
  first, second = (x[0]["train_loss"] for x in losses)
  np.testing.assert_allclose(first, second, rtol=1e-6)


def test_clients_without_any_product_count_alike(problem):
  # b is zero and stays so at a rate of zero, and 0 / 0 is no weight.
  algorithm = het_lora.het_lora(
    problem.loss_fn, optax.sgd(0.0), REPLACE, ranks=RANKS, population=7
  )
  state = algorithm.init(problem.trainable)
  cohort = problem.cohort(0, 1, 3)
  state, _ = jax.jit(algorithm.round)(
    state, problem.frozen, problem.examples, cohort, KEY
  )
  a = problem.trainable["a"]
  np.testing.assert_allclose(state.trainable["a"][:, 0], a[:, 0], rtol=1e-6)
  np.testing.assert_allclose(
    state.trainable["a"][:, 1], 2 / 3 * a[:, 1], rtol=1e-6
  )


def test_ranks_and_weights_are_of_all_modules_and_layers_together():
  # What is last shrinks in `top`, but grows in `q` by more: nobody is pruned.
  rng = np.random.default_rng(2)
  draw = lambda *shape: rng.normal(size=shape)
  tree = {
    "layers": {"q": {"a": draw(2, 5, 4), "b": draw(2, 4, 3)}},
    "top": {"a": 0.3 * draw(4, 4), "b": 0.3 * draw(4, 6)},
  }

  def loss_fn(trainable, frozen, examples, mask, key):
    return -mask.sum() * jnp.sum(trainable["layers"]["q"]["a"] ** 2), mask.sum()

  matrices = lambda tree: [
    *zip(*tree["layers"]["q"].values(), strict=True),
    tuple(tree["top"].values()),
  ]
  answers, norms = [], []
  for rank, first in ((2, 1), (4, 2)):
    answer, square = [], 0.0
    for number, (a, b) in enumerate(matrices(tree)):
      a, b = np.copy(a), np.copy(b)
      a[:, rank:], b[rank:] = 0, 0
      of_a, of_b = np.linalg.norm(a[:, first:]), np.linalg.norm(b[first:])
      pull_a, pull_b = np.zeros_like(a), np.zeros_like(b)
      pull_a[:, first:] = a[:, first:] * of_b / of_a
      pull_b[first:] = b[first:] * of_a / of_b
      slope = -2 * a if number < 2 else 0
      a, b = a - 0.1 * (slope + PENALTY * pull_a), b - 0.1 * PENALTY * pull_b
      answer.append((a, b))
      square += np.sum((a @ b) ** 2)
    answers.append(answer)
    norms.append(np.sqrt(square))

  algorithm = het_lora.het_lora(
    loss_fn,
    optax.sgd(0.1),
    REPLACE,
    ranks=(2, 4),
    decay=0.5,
    penalty=PENALTY,
    population=2,
  )
  rows = np.zeros((2, 1, 1), np.int32)
  cohort = clients.Cohort(
    np.arange(2, dtype=np.int32), rows, rows == 0, np.ones(2, np.float32)
  )
  state, _ = jax.jit(algorithm.round)(
    algorithm.init(tree), {}, {"x": np.zeros(1, np.float32)}, cohort, KEY
  )
  assert state.upload.tolist() == [2, 4]
  for got, small, large in zip(
    matrices(state.trainable), *answers, strict=True
  ):
    for leaf, x, y in zip(got, small, large, strict=True):
      expected = (norms[0] * x + norms[1] * y) / sum(norms)
      np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("knob", [{"decay": 0.0}, {"penalty": -1.0}])
def test_knobs_out_of_range_are_refused(problem, knob):
  with pytest.raises(ValueError, match="decay in"):
    het_lora.het_lora(problem.loss_fn, SGD, REPLACE, population=7, **knob)
