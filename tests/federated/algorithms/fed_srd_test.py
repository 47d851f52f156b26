import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, sparse, supports, wire
from fedjax_llm.federated import clients, draws, factors
from fedjax_llm.federated.algorithms import fed_avg, fed_srd
from tests import placements

KEY = jax.random.key(8)
SGD = optax.sgd(0.05, momentum=0.9)
KNOBS = dict(upload_density=0.5, download_density=0.75)


@functools.cache
def compose(loss_fn, **knobs):
  algorithm = fed_srd.fed_srd(
    loss_fn, SGD, population=7, placement=placements.ALONE, **KNOBS | knobs
  )
  return algorithm, jax.jit(algorithm.round)


def run(problem, cohorts, **knobs):
  """The states before and after each round, and the metrics."""
  algorithm, step = compose(problem.loss_fn, **knobs)
  states, every = [algorithm.init(problem.trainable)], []
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    state, metrics = step(states[-1], *arguments)
    states.append(state)
    every.append(metrics)
  return jax.device_get(states), jax.device_get(every)


# The oracle. Of the toy problem, `a` is 6 by 2, `b` is 2 by 4.


def parts(flat):
  return [flat[:12].reshape(6, 2), flat[12:20].reshape(2, 4), flat[20:]]


def np_sent(start, trained, density):
  """The update of a client as it arrives: a, b and head, each a matrix."""
  (old_a, _, _), (_, new_b, _) = parts(start), parts(trained)
  arrived = []
  for name, delta in zip("abh", parts(trained - start), strict=True):
    score = abs(delta)
    for i in np.ndindex(delta.shape):
      if name == "a":
        score[i] *= np.sqrt((new_b[i[1]] ** 2).sum())
      if name == "b":
        score[i] *= np.sqrt((old_a[:, i[0]] ** 2).sum())
    kept = np.zeros(delta.size)
    order = np.argsort(-score.ravel(), kind="stable")
    chosen = order[: max(1, int(density * delta.size))]
    kept[chosen] = delta.ravel()[chosen]
    scale = abs(delta).sum() / abs(kept).sum() if kept.any() else 1
    arrived.append(kept * scale)
  return np.concatenate(arrived)


def np_aim(start, arrived, weights, name, truncated):
  """Where the server wants to be: a, b and head."""
  a, b, _ = parts(start)
  mean, head = np.zeros((6, 4)), np.zeros(4)
  for delta, weight in zip(arrived, weights / weights.sum(), strict=True):
    own_a, own_b, own_head = parts(start + delta)
    mean += weight * own_a @ own_b
    head += weight * own_head
  if truncated:
    u, s, v = np.linalg.svd(mean, full_matrices=False)
    mean = u[:, :2] * s[:2] @ v[:2]
  rcond = 60 * np.finfo(np.float64).eps
  if name == "a":
    a = a + (mean - a @ b) @ np.linalg.pinv(b, rcond=rcond)
  else:
    b = b + np.linalg.pinv(a, rcond=rcond) @ (mean - a @ b)
  return np.concatenate([a.ravel(), b.ravel(), head])


def drawn(number, name, density):
  """Which entries travel down, by the draw that the message's seed makes."""
  of_part = np.r_[0:12, 20:24] if name == "a" else np.r_[12:24]
  ones = jnp.ones(of_part.size)
  key = draws.stream(KEY, draws.Purpose.SERVER, number)
  compressor = sparse.random_k(density, unbiased=False)
  received = base.transmit(compressor, ones, (), key).received
  return of_part[np.asarray(received) > 0], of_part.size


@pytest.mark.parametrize("truncated", [True, False])
def test_fed_srd_is_its_oracle_in_float64(problem, oracle, truncated):
  # Without truncation the method is FedSRD-e.
  cohorts = problem.cohorts(4)
  with jax.enable_x64(True):
    states, _ = run(problem, cohorts, truncated=truncated)
    draws = [drawn(i, "ba"[i % 2], 0.75) for i in range(4)]
  flat = oracle.flatten(problem.trainable)
  for number, (cohort, state) in enumerate(
    zip(cohorts, states[1:], strict=True)
  ):
    arrived = []
    for indices, mask in zip(cohort.indices, cohort.mask, strict=True):
      trained = oracle.local_sgd(problem, flat, indices, mask, 0.05, 0.9)
      arrived.append(np_sent(flat, trained, 0.5))
    weights = cohort.weights.astype(np.float64)
    name = "ba"[number % 2]
    aim = np_aim(flat, arrived, weights, name, truncated)
    kept, size = draws[number]
    flat = flat.copy()
    flat[kept] += (aim - flat)[kept] * size / len(kept)
    got = oracle.flatten(state.trainable)
    np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-13)


DENSE = dict(upload_density=1.0, download_density=1.0)


def test_the_server_goes_nearest_to_the_mean_product(problem):
  # FedSRD-e with nothing lost: any other `b` would be farther.
  states, _ = run(problem, problem.cohorts(1), truncated=False, **DENSE)
  start, after = (state.trainable for state in states)
  np.testing.assert_array_equal(after["a"], start["a"])
  each = []
  cohort = problem.cohorts(1)[0]
  dense = fed_avg.fed_avg(problem.loss_fn, SGD, optax.sgd(1.0))
  step = jax.jit(dense.round)
  for weights in np.eye(3, dtype=np.float32):
    arguments = (problem.frozen, problem.examples)
    alone = cohort._replace(weights=weights)
    state, _ = step(dense.init(problem.trainable), *arguments, alone, KEY)
    each.append(state.trainable["a"] @ state.trainable["b"])
  weights = cohort.weights / cohort.weights.sum()
  mean = sum(w * np.asarray(x) for w, x in zip(weights, each, strict=True))
  best, *_ = np.linalg.lstsq(np.asarray(start["a"]), mean)
  np.testing.assert_allclose(after["b"], best, rtol=1e-3, atol=1e-5)


def test_while_b_is_zero_moving_a_changes_nothing(problem):
  # What the authors' order does in the first round; then it is b's turn.
  states, _ = run(problem, problem.cohorts(2), a_first=True)
  first, second, third = (state.trainable for state in states)
  np.testing.assert_array_equal(second["a"], first["a"])
  assert not second["b"].any()
  assert third["b"].any()


def test_factors_take_turns_and_the_head_moves_always(problem):
  states, _ = run(problem, problem.cohorts(3))
  for number, (old, new) in enumerate(zip(states, states[1:], strict=False)):
    same = "ab"[number % 2]
    np.testing.assert_array_equal(new.trainable[same], old.trainable[same])
    for name in ("head", "ba"[number % 2]):
      assert np.any(new.trainable[name] != old.trainable[name])


def test_a_client_fetches_what_it_missed_but_no_more_than_all(problem):
  # Client 2 comes in rounds 0, 1 and 4, client 5 in all others.
  who = [(2,), (2,), (5,), (5,), (2,), (5,)]
  cohorts = [problem.cohort(*each) for each in who]
  _, metrics = run(problem, cohorts, download_density=0.1)
  seed = np.zeros(2, np.uint32)
  message = lambda k, n: len(
    wire.dumps(sparse.Seeded(np.zeros(k, np.float32), seed, n))
  )
  # Down go b and head, 12 entries, in even rounds; a and head, 16, in odd ones.
  even, odd = message(1, 12), message(1, 16)
  vector, _ = ravel_pytree(problem.trainable)
  dense = len(wire.dumps(base.Dense(np.zeros(vector.size, np.float32))))
  assert even + odd + even < dense
  assert [int(x["download_bytes"][0]) for x in metrics] == [
    *(dense, even, dense, even, odd + even + odd, odd + even),
  ]
  assert [int(x["download_entries"][0]) for x in metrics] == [
    *(24, 1, 24, 1, 3, 2),
  ]
  # Where messages are not that small, it fetches all.
  _, metrics = run(problem, cohorts)
  assert int(metrics[4]["download_bytes"][0]) == dense


def test_uploads_hold_a_share_of_each_matrix(problem):
  _, metrics = run(problem, [problem.cohort(2, 5)])
  support = np.zeros(supports.nbytes(24, 12), np.uint8)
  payload = sparse.Sparse(np.zeros(12, np.float32), support, 24)
  assert metrics[0]["upload_bytes"].tolist() == [len(wire.dumps(payload))] * 2
  assert metrics[0]["upload_entries"].tolist() == [6 + 4 + 2] * 2


def test_a_round_of_nobody_only_counts(problem):
  cohort = problem.cohort(2, 5)
  nobody = cohort._replace(weights=np.zeros(2, np.float32))
  (_, before, after), _ = run(problem, [cohort, nobody])
  jax.tree.map(
    np.testing.assert_array_equal, after, before._replace(round=np.int32(2))
  )


def test_stacked_layers_are_matrices_of_their_own():
  # Two layers trained as one leaf, and as two modules: the same.
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 2, 3))
  a, b = a.astype(np.float32), b.astype(np.float32)
  stacked = {"q": {"a": a, "b": b}}
  apart = {f"q{i}": {"a": a[i], "b": b[i]} for i in range(2)}

  def loss_fn(trainable, frozen, examples, mask, key):
    del frozen, key
    each = [pair.a @ pair.b for pair in factors.pairs(trainable).values()]
    product = each[0] if len(each) == 1 else jnp.stack(each)
    losses = ((examples["x"] - product[None]) ** 2).sum((1, 2, 3))
    return jnp.where(mask, losses, 0).sum(), mask.sum()

  examples = {"x": rng.normal(size=(4, 2, 5, 3)).astype(np.float32)}
  cohort = clients.Cohort(
    np.arange(2, dtype=np.int32),
    np.arange(4, dtype=np.int32).reshape(2, 2, 1),
    np.ones((2, 2, 1), bool),
    np.ones(2, np.float32),
  )

  def after(trainable):
    algorithm = fed_srd.fed_srd(
      loss_fn,
      optax.sgd(0.01),
      population=2,
      upload_density=0.5,
      download_density=1.0,
    )
    state, step = algorithm.init(trainable), jax.jit(algorithm.round)
    for _ in range(2):
      state, _ = step(state, {}, examples, cohort, KEY)
    return state.trainable

  got, expected = after(stacked), after(apart)
  for i in range(2):
    for name in "ab":
      np.testing.assert_allclose(
        got["q"][name][i], expected[f"q{i}"][name], rtol=1e-4, atol=1e-5
      )


def test_what_cannot_work_is_refused(problem):
  with pytest.raises(ValueError, match="density in"):
    compose(problem.loss_fn, upload_density=0.0)
  with pytest.raises(ValueError, match="density in"):
    compose(problem.loss_fn, download_density=1.5)
  algorithm, _ = compose(problem.loss_fn)
  with pytest.raises(ValueError, match="LoRA factors"):
    algorithm.init({"head": problem.trainable["head"]})
