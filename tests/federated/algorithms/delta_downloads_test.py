import functools

import jax
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import sparse, wire
from fedjax_llm.federated import aggregators
from fedjax_llm.federated.algorithms import delta_downloads, fed_avg, flasc
from tests import placements

KEY = jax.random.key(4)
SGD = optax.sgd(0.05, momentum=0.9)
ADAMW = flasc.server_adamw(0.1)


@functools.cache
def compose(loss_fn, download=None, upload=None):
  algorithm = delta_downloads.delta_downloads(
    loss_fn,
    SGD,
    ADAMW,
    population=7,
    download=download,
    upload=upload,
    placement=placements.ALONE,
  )
  return algorithm, jax.jit(algorithm.round)


HALF, THIRD = sparse.top_k(0.6), sparse.top_k(0.3)


def run(problem, cohorts, download=None, upload=None):
  """The last state and all metrics."""
  algorithm, step = compose(problem.loss_fn, download, upload)
  state, seen = algorithm.init(problem.trainable), []
  for cohort in cohorts:
    state, metrics = step(state, problem.frozen, problem.examples, cohort, KEY)
    seen.append(jax.device_get(metrics))
  return state, seen


def test_delta_downloads_are_their_oracle_in_float64(problem, oracle):
  cohorts = problem.cohorts(4)
  expected = oracle.flatten(problem.trainable)
  copies = {client: expected.copy() for client in range(7)}
  server = oracle.adamw(0.1)
  for cohort in cohorts:
    update = np.zeros_like(expected)
    for i, client in enumerate(cohort.clients.tolist()):
      start = copies[client] + oracle.top_k(expected - copies[client], 0.6)
      copies[client] = start
      trained = oracle.local_sgd(
        problem, start, cohort.indices[i], cohort.mask[i], 0.05, 0.9
      )
      update += oracle.top_k(start - trained, 0.3)
    expected = server(expected, update / len(cohort.clients))
  with jax.enable_x64(True):
    state, _ = run(problem, cohorts, HALF, THIRD)
  got = oracle.flatten(state.trainable)
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
  for client, copy in copies.items():
    np.testing.assert_allclose(state.upload[0][client], copy, rtol=1e-12)


def test_uncompressed_it_is_fed_avg(problem):
  cohorts = problem.cohorts(3)
  state, _ = run(problem, cohorts)
  dense = fed_avg.fed_avg(
    problem.loss_fn,
    SGD,
    ADAMW,
    aggregate=aggregators.uniform_mean(),
    placement=placements.ALONE,
  )
  step, expected = jax.jit(dense.round), dense.init(problem.trainable)
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    expected, _ = step(expected, *arguments)
  # A difference and a sum round, where a plain download does not.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, state.trainable, expected.trainable)


def test_what_a_download_loses_comes_with_the_next(problem):
  # The client is asked again and again, and the server stands still.
  cohort = problem.cohort(3)
  nobody = cohort._replace(mask=np.zeros_like(cohort.mask))
  still = optax.sgd(0.0)
  algorithm = delta_downloads.delta_downloads(
    problem.loss_fn, SGD, still, population=7, download=sparse.top_k(0.25)
  )
  state = algorithm.init(problem.trainable)
  moved = jax.tree.map(lambda x: x + 0.1, state.trainable)
  state, step = state._replace(trainable=moved), jax.jit(algorithm.round)
  distances = []
  for _ in range(5):
    arguments = (problem.frozen, problem.examples, nobody, KEY)
    state, _ = step(state, *arguments)
    vector, _ = jax.flatten_util.ravel_pytree(moved)
    distances.append(np.count_nonzero(~np.isclose(state.upload[0][3], vector)))
  n = vector.size
  assert distances == [max(0, n - i * (n // 4)) for i in range(1, 6)]
  # Who was not asked has what the seed drew.
  start, _ = jax.flatten_util.ravel_pytree(problem.trainable)
  np.testing.assert_allclose(state.upload[0][0], start, rtol=1e-6)


def test_both_messages_are_counted(problem):
  n = sum(x.size for x in jax.tree.leaves(problem.trainable))
  quantize = compression.lloyd_max(2, block=8)
  _, (metrics,) = run(problem, problem.cohorts(1), quantize, THIRD)
  vector = np.ones(n, np.float32)
  lengths = [
    len(wire.dumps(compressor.encode(vector, (), KEY)[0]))
    for compressor in (quantize, THIRD)
  ]
  assert metrics["download_bytes"].tolist() == [lengths[0]] * 3
  assert metrics["upload_bytes"].tolist() == [lengths[1]] * 3
  assert metrics["download_entries"].tolist() == [n] * 3
  assert metrics["upload_entries"].tolist() == [int(0.3 * n)] * 3


def test_a_download_may_be_a_chain(problem):
  cohorts = problem.cohorts(2)
  chained = compression.chain(HALF, compression.identity())
  state, _ = run(problem, cohorts, chained, THIRD)
  expected, _ = run(problem, cohorts, HALF, THIRD)
  np.testing.assert_array_equal(state.upload[0], expected.upload[0])


def test_a_download_with_a_memory_is_refused(problem):
  download = compression.error_feedback(sparse.top_k(0.5))
  algorithm, _ = compose(problem.loss_fn, download)
  with pytest.raises(ValueError, match="without memory"):
    algorithm.init(problem.trainable)
