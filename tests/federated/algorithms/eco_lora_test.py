import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm import compression
from fedjax_llm.compression import base, sparse, wire
from fedjax_llm.federated.algorithms import eco_lora, fed_avg
from tests import placements

KEY = jax.random.key(6)
SGD = optax.sgd(0.05, momentum=0.9)
REPLACE = optax.sgd(1.0)
KNOBS = dict(
  segment_count=5,
  a_densities=(0.4, 0.7),
  b_densities=(0.4, 1.0),
  decay=4.0,
  levels=3,
)


@functools.cache
def compose(loss_fn, server=REPLACE, client=SGD, **knobs):
  algorithm = eco_lora.eco_lora(
    loss_fn,
    client,
    server,
    population=7,
    placement=placements.ALONE,
    **KNOBS | knobs,
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


# The oracle. Segments by hand: 12 entries of `a`, 12 of the rest, 5 segments of
# three and three, of which the last are empty.


def indices_of(number):
  return [list(range(s, s + 12)[3 * number :][:3]) for s in (0, 12)]


def np_losses(problem, flat, indices, mask):
  """The summed loss of a client's steps of plain SGD with momentum."""
  a, b, head = flat[:12].reshape(6, 2), flat[12:20].reshape(2, 4), flat[20:]
  rows = indices[mask]
  x, y = problem.examples["x"][rows], problem.examples["y"][rows]
  hidden = np.tanh(x @ (problem.frozen["w"] + a @ b))
  return ((hidden @ head - y) ** 2).sum()


def np_client(problem, oracle, flat, indices, mask):
  """What was trained, and the loss of every step before it was taken."""
  total, velocity, trained = 0.0, np.zeros_like(flat), flat
  for rows, real in zip(indices, mask, strict=True):
    if not real.any():
      continue
    total += np_losses(problem, trained, rows, real)
    grads = [
      oracle.gradient(
        trained,
        problem.frozen["w"],
        problem.examples["x"][row],
        problem.examples["y"][row],
      )
      for row in rows[real]
    ]
    velocity = 0.9 * velocity + sum(grads) / len(grads)
    trained = trained - 0.05 * velocity
  return trained, total


def test_eco_lora_is_its_oracle_in_float64(problem, oracle):
  # Several clients send some segments and none sends others; levels change;
  # clients come again with their residuals.
  cohorts = problem.cohorts(4, size=6)
  with jax.enable_x64(True):
    states, _ = run(problem, cohorts)
  flat, residuals = oracle.flatten(problem.trainable), np.zeros((7, 24))
  first, last, levels = 0.0, 0.0, []
  for number, (cohort, state) in enumerate(
    zip(cohorts, states[1:], strict=True)
  ):
    level = round(np.exp(-4.0 * max(first - last, 0)) * 2)
    levels.append(level)
    densities = 0.4 + 0.3 * level / 2, 0.4 + 0.6 * level / 2
    sums, weights, losses = np.zeros(24), np.zeros(24), 0.0
    for client, indices, mask, weight in zip(*cohort, strict=True):
      trained, loss = np_client(problem, oracle, flat, indices, mask)
      losses += loss
      for own, density in zip(
        indices_of((client + number) % 5), densities, strict=True
      ):
        part = np.zeros(3)
        part[: len(own)] = (flat - trained + residuals[client])[own]
        sent = oracle.top_k(part, density)
        residuals[client, own] = (part - sent)[: len(own)]
        sums[own] += weight * sent[: len(own)]
        weights[own] += weight
    flat = flat - sums / np.where(weights > 0, weights, 1)
    last = losses / cohort.mask.sum()
    first = last if number == 0 else first
    got = oracle.flatten(state.trainable)
    np.testing.assert_allclose(got, flat, rtol=1e-12, atol=1e-13)
  # They went down.
  assert levels[0] == 2
  assert len(set(levels)) > 1
  # Reported in float32, whatever is trained.
  np.testing.assert_allclose(states[-1].losses, [first, last], rtol=1e-6)


def test_one_dense_segment_is_fed_avg(problem):
  whole = dict(segment_count=1, a_densities=(1.0, 1.0), b_densities=(1.0, 1.0))
  cohorts = problem.cohorts(3)
  (*_, state), _ = run(problem, cohorts, **whole)
  dense = fed_avg.fed_avg(
    problem.loss_fn, SGD, REPLACE, placement=placements.ALONE
  )
  step, expected = jax.jit(dense.round), dense.init(problem.trainable)
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    expected, _ = step(expected, *arguments)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    state.trainable,
    jax.device_get(expected.trainable),
  )
  assert not state.residuals.any()


def rows(problem, tree):
  index, _ = eco_lora.segments(problem.trainable, 5)
  return np.append(ravel_pytree(tree)[0], 0)[index]


def test_a_client_sends_its_segment_and_no_other(problem, recorder):
  # Client 2 alone, over as many rounds as there are segments: each once.
  cohorts = [problem.cohort(2, order=i) for i in range(5)]
  states, _ = run(problem, cohorts, server=recorder)
  for number, state in enumerate(states[1:]):
    sent = rows(problem, state.optimizer).any(axis=1)
    assert np.flatnonzero(sent).tolist() in ([(2 + number) % 5], [])
  sent = sum(abs(rows(problem, state.optimizer)) for state in states[1:])
  # Four of each kind fill segments of three; the last segment is empty.
  assert sent.any(axis=1).tolist() == [True] * 4 + [False]


def test_what_was_sent_and_the_residual_are_all_that_there_was(
  problem, recorder
):
  # Telescopes over the rounds in which it was a segment's turn. The recorder
  # moves nothing, so every round trains the same update.
  cohorts = [problem.cohort(2)] * 5 + [problem.cohort(3)] + [problem.cohort(2)]
  states, _ = run(problem, cohorts, server=recorder)
  dense = dict(segment_count=1, a_densities=(1.0, 1.0), b_densities=(1.0, 1.0))
  (_, whole), _ = run(problem, [problem.cohort(2)], server=recorder, **dense)
  update = rows(problem, whole.optimizer)
  mine = states[1:6] + states[7:]
  sent = sum(rows(problem, state.optimizer) for state in mine)
  # Segment (2 + 6) % 5 had two turns.
  turns = np.array([1, 1, 1, 2, 1])[:, None]
  np.testing.assert_allclose(
    sent + states[-1].residuals[2], turns * update, rtol=1e-5, atol=1e-6
  )
  assert states[-1].residuals[2].any()
  # The last change of client 2 left the residual of client 3 alone.
  np.testing.assert_array_equal(states[-1].residuals[3], states[6].residuals[3])


def test_a_lower_loss_sends_fewer_bytes(problem):
  # Levels of densities, each with the bytes of its own message.
  cohorts = [problem.cohort(2, 5, order=i) for i in range(12)]
  states, metrics = run(problem, cohorts)
  report = len(wire.dumps(base.Dense(np.zeros(2, np.float32))))
  sizes = []
  for k in (1 + 1, 1 + 2, 2 + 3):
    vector = np.arange(6, dtype=np.float32)
    payload, _ = sparse.top_k(k / 6 + 1e-6).encode(vector, (), KEY)
    sizes.append(len(wire.dumps(payload)) + report)
  seen = [int(x["upload_bytes"][0]) for x in metrics]
  for state, size in zip(states, seen, strict=False):
    drop = max(float(state.losses[0] - state.losses[1]), 0)
    assert size == sizes[round(np.exp(-4.0 * drop) * 2)]
  assert seen[0] == sizes[2] > seen[-1]
  level = len(wire.dumps(base.Dense(np.zeros(1, np.uint8))))
  vector, _ = ravel_pytree(problem.trainable)
  dense = len(wire.dumps(base.Dense(np.zeros(vector.size, np.float32))))
  assert metrics[0]["download_bytes"].tolist() == [dense + level] * 2


def test_the_download_may_be_compressed(problem):
  lossy = compression.stochastic_uniform(8, block=24)
  states, metrics = run(problem, problem.cohorts(2), download=lossy)
  algorithm, _ = compose(problem.loss_fn, download=lossy)
  received = ravel_pytree(algorithm.received(states[1], KEY))[0]
  vector = ravel_pytree(states[1].trainable)[0]
  np.testing.assert_allclose(received, vector, atol=1e-2)
  assert (received != vector).any()
  assert (metrics[1]["download_bytes"] < 4 * vector.size).all()


def test_the_server_keeps_the_memory_of_its_download(problem):
  states, _ = run(
    problem, problem.cohorts(2), download=compression.power_sgd(2)
  )
  assert (states[0].download[0] != states[1].download[0]).any()


def test_a_download_that_adds_up_what_it_lost_is_refused(problem):
  lossy = compression.error_feedback(compression.stochastic_uniform(8))
  with pytest.raises(ValueError, match=r"algorithms\.delta_downloads"):
    compose(problem.loss_fn, download=lossy)


def test_a_round_of_nobody_only_counts(problem):
  # Also if it is the first: the first loss is that of the first answer.
  cohort = problem.cohort(2, 5)
  nobody = cohort._replace(weights=np.zeros(2, np.float32))
  (start, skipped, after), _ = run(problem, [nobody, cohort])
  jax.tree.map(
    np.testing.assert_array_equal, skipped, start._replace(round=np.int32(1))
  )
  assert after.losses[0] == after.losses[1] > 0


def test_segments_hold_every_entry_once(problem):
  tree = {
    "layers": {
      "q": {"a": jnp.arange(12.0).reshape(2, 3, 2), "b": jnp.ones((2, 2, 5))}
    },
    "score": {"kernel": jnp.full((3, 2), 7.0)},
  }
  index, sizes = eco_lora.segments(tree, 4)
  # 12 of `a` and 20 + 6 others, in four segments, the last filled up.
  assert sizes == (3, 7)
  vector, _ = ravel_pytree(tree)
  np.testing.assert_array_equal(vector[index[:, :3].ravel()], np.arange(12))
  assert sorted(index.ravel()) == [*range(38), 38, 38]
  # Without any `a` too.
  index, sizes = eco_lora.segments({"score": jnp.arange(5.0)}, 2)
  assert sizes == (0, 3)
  assert index.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(a_densities=(0.5, 0.25)), "least, largest"),
    (dict(b_densities=(0.0, 0.5)), "least, largest"),
    (dict(segment_count=0), "segment_count >= 1"),
    (dict(decay=-1.0), "decay >= 0"),
    (dict(levels=1), "levels in"),
  ],
)
def test_what_is_out_of_range_is_refused(problem, wrong, message):
  with pytest.raises(ValueError, match=message):
    compose(problem.loss_fn, **wrong)
