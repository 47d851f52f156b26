import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm import compression
from fedjax_llm.compression import base, sparse, wire
from fedjax_llm.federated import aggregators, channels
from fedjax_llm.federated.algorithms import fed_avg
from tests import placements

KEY = jax.random.key(7)
SGD = optax.sgd(0.05, momentum=0.9)
ADAMW = optax.adamw(0.05, weight_decay=0.1)
# One step of it doubles the parameters: the update is minus the start.
DOUBLE = optax.stateless(lambda updates, params: params)
FEEDBACK = compression.error_feedback(sparse.top_k(0.25))
# Both ways with memory, and up at random.
CHANNEL = channels.Channel(
  download=compression.power_sgd(2),
  upload=compression.error_feedback(compression.stochastic_uniform(4)),
)
ODD = lambda client: client % 2
# Of even clients, which have no memory, and of odd ones.
TIERS = channels.Tiers(
  (
    channels.Channel(download=sparse.top_k(0.25)),
    channels.Channel(download=sparse.top_k(0.75), upload=FEEDBACK),
  ),
  ODD,
)
HALF = channels.Channel(download=sparse.top_k(0.5), trains=sparse.support)


@functools.cache
def compose(
  loss_fn,
  channel,
  server=None,
  client=SGD,
  *,
  placement=placements.ALONE,
  **parts,
):
  """An algorithm, and its round compiled once for all tests."""
  algorithm = fed_avg.fed_avg(
    loss_fn,
    client,
    server or optax.sgd(1.0),
    channel=channel,
    population=7,
    placement=placement,
    **parts,
  )
  algorithm = algorithm._replace(received=jax.jit(algorithm.received))
  return algorithm, jax.jit(algorithm.round)


def run(problem, cohorts, *knobs, **parts):
  """The states before and after each round, and the metrics of each."""
  algorithm, step = compose(problem.loss_fn, *knobs, **parts)
  states, history = [algorithm.init(problem.trainable)], []
  for cohort in cohorts:
    arguments = (problem.frozen, problem.examples, cohort, KEY)
    state, metrics = step(states[-1], *arguments)
    states.append(state)
    history.append(jax.device_get(metrics))
  return states, history


def flat(tree):
  return np.asarray(ravel_pytree(tree)[0])


def alone(cohort, i):
  """The cohort, of which only one client is there."""
  weights = (np.arange(len(cohort.clients)) == i).astype(np.float32)
  return cohort._replace(weights=weights)


def assert_same_bits(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_tiers_of_one_channel_are_no_tiers_bit_for_bit(problem):
  cohorts = problem.cohorts(3)
  got = run(problem, cohorts, channels.Tiers((CHANNEL,), jnp.zeros_like))
  assert_same_bits(got, run(problem, cohorts, CHANNEL))


def test_tiers_that_are_alike_are_no_tiers(problem):
  channel = channels.Channel(sparse.top_k(0.5), sparse.top_k(0.25))
  cohorts = problem.cohorts(3)
  states, metrics = run(problem, cohorts, channels.Tiers((channel,) * 2, ODD))
  expected, others = run(problem, cohorts, channel)
  # To rounding, because it is another program.
  np.testing.assert_allclose(
    flat(states[-1].trainable), flat(expected[-1].trainable), rtol=1e-5
  )
  for got, other in zip(metrics, others, strict=True):
    for name in ("download_bytes", "upload_bytes", "upload_entries"):
      np.testing.assert_array_equal(got[name], other[name])


def test_every_client_starts_from_what_its_tier_received(
  problem, oracle, recorder
):
  cohort = problem.cohort(2, 5, steps=1)
  vector = flat(problem.trainable).astype(np.float32)
  for i, density in enumerate((0.25, 0.75)):
    plain = channels.Tiers(
      (
        channels.Channel(download=sparse.top_k(0.25)),
        channels.Channel(download=sparse.top_k(0.75)),
      ),
      ODD,
    )
    states, _ = run(problem, [alone(cohort, i)], plain, recorder, DOUBLE)
    got = -flat(states[-1].optimizer)
    np.testing.assert_array_equal(got, oracle.top_k(vector, density))


def test_the_metrics_are_of_the_messages_of_each_client_s_tier(problem):
  cohort = problem.cohort(2, 5, 4)
  _, (metrics,) = run(problem, [cohort], TIERS)
  assert metrics["download_entries"].tolist() == [6, 18, 6]
  assert metrics["upload_entries"].tolist() == [24, 6, 24]
  dense = len(wire.dumps(base.Dense(np.zeros(24, np.float32))))
  assert metrics["upload_bytes"].tolist()[::2] == [dense] * 2
  # Three bytes of a support, at most sixteen of headers.
  sizes = {"download_bytes": [6, 18, 6], "upload_bytes": [24, 6, 24]}
  for name, entries in sizes.items():
    for nbytes, count in zip(metrics[name], entries, strict=True):
      assert 4 * count < nbytes <= 4 * count + 3 + 16


def test_only_clients_of_a_tier_use_its_memory(problem):
  cohort = problem.cohort(2, 5, 4)
  states, _ = run(problem, [cohort], TIERS)
  first, second = states[-1].upload
  assert not jax.tree.leaves(first)
  residual = np.asarray(second[0])
  assert np.flatnonzero(residual.any(axis=1)).tolist() == [5]


def test_what_is_received_is_what_the_last_tier_receives(problem, oracle):
  algorithm, _ = compose(problem.loss_fn, TIERS)
  got = algorithm.received(algorithm.init(problem.trainable), KEY)
  vector = flat(problem.trainable).astype(np.float32)
  np.testing.assert_array_equal(flat(got), oracle.top_k(vector, 0.75))


def test_tiers_at_random_draw_each_for_itself(problem, recorder):
  random = channels.Channel(download=sparse.random_k(0.5))
  tiers = channels.Tiers((random, random), ODD)
  cohort = problem.cohort(2, 5, steps=1)
  runs = [
    run(problem, [alone(cohort, i)], tiers, recorder, DOUBLE) for i in range(2)
  ]
  first, second = (flat(states[-1].optimizer) for states, _ in runs)
  assert np.count_nonzero(first) > 0
  assert ((first != 0) != (second != 0)).any()


@pytest.mark.parametrize("is_on_mesh", [False, True])
def test_placements_of_tiers_agree(problem, is_on_mesh):
  # Vmapped, both branches of every client are computed and one is taken.
  cohorts = problem.cohorts(2)
  where = placements.on(2 if is_on_mesh else 1, placements.EVERYBODY)
  parts = {"placement": where}
  got = run(problem, cohorts, TIERS, **parts)
  expected = run(problem, cohorts, TIERS)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, got, expected)


@pytest.mark.parametrize(
  "download",
  [
    FEEDBACK,
    compression.ef_sign_sgd(),
    compression.relative_to(jnp.ones(24), FEEDBACK),
  ],
)
def test_a_download_that_is_for_updates_is_refused(download):
  with pytest.raises(ValueError, match=r"algorithms\.delta_downloads"):
    channels.Channel(download)
  plain = channels.Channel(upload=download)
  with pytest.raises(ValueError, match=r"algorithms\.delta_downloads"):
    dataclasses.replace(plain, download=download)
  with pytest.raises(dataclasses.FrozenInstanceError):
    plain.download = download


def test_a_factory_that_was_not_called_is_refused():
  with pytest.raises(ValueError, match="expected a Compressor as download"):
    channels.Channel(sparse.top_k)


def test_an_upload_is_a_compressor_or_makes_one():
  with pytest.raises(ValueError, match="a Compressor as upload.*, got 0.25"):
    channels.Channel(upload=0.25)


def test_messages_are_counted_exactly_up_to_what_int32_holds():
  entries = (2**31 - 1) // 4 - 4
  payload = base.Dense(jax.ShapeDtypeStruct((entries,), jnp.float32))
  nbytes = wire.nbytes(payload)
  assert nbytes > 2**31 - 20
  assert channels.sizes(payload).tolist() == [nbytes, entries]
  short = base.Dense(jax.ShapeDtypeStruct((3,), jnp.float32))
  alone = wire.nbytes(short)
  assert channels.sizes(short, short).tolist() == [2 * alone, 6]
  with pytest.raises(ValueError, match=f"one of {nbytes + alone} bytes"):
    channels.sizes(payload, short)


@pytest.mark.parametrize("direction", ["download", "upload"])
def test_a_message_of_over_2_gib_is_refused_before_a_round(direction):
  # Of shapes alone: nothing of that size is allocated.
  wide = base.stateless(
    lambda vector, key: base.Dense(jnp.tile(vector, 2**28)),
    lambda payload: payload.values[:3],
  )
  channel = channels.Channel(**{direction: wide})
  with pytest.raises(ValueError, match="below 2 GiB, got one of 3221225"):
    channels.upload_states(channel, jnp.ones(3), None)


def test_no_tiers_are_refused(problem):
  with pytest.raises(ValueError, match="at least one channel"):
    compose(problem.loss_fn, channels.Tiers((), ODD))


@pytest.mark.parametrize("client", [SGD, ADAMW])
def test_clients_move_only_what_they_train(problem, recorder, client):
  # AdamW would decay entries without a gradient; momentum would move them on.
  vector = flat(problem.trainable).astype(np.float32)
  mask = np.asarray(sparse.top_k_mask(jnp.asarray(vector), 12))
  states, _ = run(problem, [problem.cohort(2, 5)], HALF, recorder, client)
  update = flat(states[-1].optimizer)
  assert update[mask].any()
  assert not update[~mask].any()


def test_a_mask_of_everything_is_no_mask(problem):
  everything = lambda payload: jnp.ones(payload.size, bool)
  states, _ = run(
    problem,
    problem.cohorts(2),
    channels.Channel(download=sparse.top_k(0.5), trains=everything),
  )
  dense, _ = run(
    problem, problem.cohorts(2), channels.Channel(download=sparse.top_k(0.5))
  )
  # To rounding: a selection in the program may change how it is fused.
  np.testing.assert_allclose(
    flat(states[-1].trainable), flat(dense[-1].trainable), rtol=1e-5
  )


def test_one_tier_may_train_a_part_and_another_everything(problem, recorder):
  dense = channels.Channel(download=sparse.top_k(0.5))
  tiers = channels.Tiers((HALF, dense), ODD)
  vector = flat(problem.trainable).astype(np.float32)
  mask = np.asarray(sparse.top_k_mask(jnp.asarray(vector), 12))
  cohort = problem.cohort(2, 5)
  moved = [
    flat(run(problem, [alone(cohort, i)], tiers, recorder)[0][-1].optimizer)
    for i in range(2)
  ]
  assert not moved[0][~mask].any()
  assert moved[1][~mask].any()


def test_a_round_of_nobody_changes_nothing_but_its_number(problem):
  # Not even the server's momentum, nor the memory of its own messages.
  nobody = problem.cohort(2, 5, 4)
  nobody = nobody._replace(weights=np.zeros(3, np.float32))
  cohorts = [problem.cohort(0, 1, 6), nobody]
  server = optax.adam(0.05)
  (_, before, after), _ = run(problem, cohorts, CHANNEL, server)
  assert (int(before.round), int(after.round)) == (1, 2)
  assert_same_bits(after._replace(round=before.round), before)


def test_an_aggregator_may_step_without_anybody(problem):
  # As privacy asks: that nobody was there must not show.
  aggregate = aggregators.weighted_mean()._replace(steps_when_empty=True)
  nobody = problem.cohort(2, 5, 4)
  nobody = nobody._replace(weights=np.zeros(3, np.float32))
  (before, after), _ = run(problem, [nobody], None, ADAMW, aggregate=aggregate)
  decay = 1 - 0.05 * 0.1
  np.testing.assert_allclose(
    flat(after.trainable), decay * flat(before.trainable), rtol=1e-6
  )
