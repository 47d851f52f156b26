import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm import compression
from fedjax_llm.compression import base, sparse, wire
from fedjax_llm.federated import aggregators, channels, clients
from fedjax_llm.federated.algorithms import fed_avg
from tests import placements

KEY = jax.random.key(11)
SGD = optax.sgd(0.1, momentum=0.9)
# One step of it doubles the parameters, so that a client's update tells, but
# for its sign, what the client started from.
DOUBLE = optax.stateless(lambda updates, params: params)


REPLACE = optax.sgd(1.0)
# What is not sent is kept; and random_k may not send what is not finite.
FEEDBACK = channels.Channel(
  upload=compression.error_feedback(sparse.random_k(0.3, unbiased=False))
)


@functools.cache
def compose(
  loss_fn, server=REPLACE, client=SGD, *, placement=placements.ALONE, **parts
):
  """An algorithm, and its round compiled once for all tests."""
  algorithm = fed_avg.fed_avg(
    loss_fn, client, server, placement=placement, **parts
  )
  algorithm = algorithm._replace(received=jax.jit(algorithm.received))
  return algorithm, jax.jit(algorithm.round, donate_argnums=0)


def advance(step, state, problem, *cohorts, examples=None):
  """The state and the metrics after a round with each cohort."""
  examples = problem.examples if examples is None else examples
  metrics = None
  for cohort in cohorts:
    state, metrics = step(state, problem.frozen, examples, cohort, KEY)
  return state, metrics


def flat(tree):
  return np.asarray(ravel_pytree(tree)[0])


def test_a_dense_round_sends_every_parameter_both_ways(problem):
  # 2 C (4 n + header) bytes.
  algorithm, step = compose(problem.loss_fn)
  state = algorithm.init(problem.trainable)
  n = flat(state.trainable).size
  header = len(wire.dumps(base.Dense(np.zeros(n, np.float32)))) - 4 * n
  assert 0 < header < 16
  _, metrics = advance(step, state, problem, problem.cohort(0, 4, 6))
  for name in ("download_bytes", "upload_bytes"):
    assert metrics[name].tolist() == [4 * n + header] * 3


def test_the_metrics_count_the_bytes_of_the_messages(problem, recorder):
  # The real messages are made here from what both ends hold.
  channel = channels.Channel(
    download=sparse.top_k(1 / 2), upload=compression.cast(jnp.bfloat16)
  )
  algorithm, step = compose(
    problem.loss_fn, recorder, client=DOUBLE, channel=channel
  )
  start = algorithm.init(problem.trainable)
  received = algorithm.received(start, KEY)
  encode = lambda compressor, vector: jax.jit(compressor.encode)(
    vector, compressor.init(vector), KEY
  )
  download, _ = encode(channel.download, flat(start.trainable))
  sent, _ = encode(channel.upload, -flat(received))
  message = wire.dumps(sent)
  state, metrics = advance(step, start, problem, problem.cohort(0, 4, steps=1))
  assert metrics["upload_bytes"].tolist() == 2 * [len(message)]
  assert metrics["download_bytes"].tolist() == 2 * [len(wire.dumps(download))]
  # And what the server averaged is what the message says.
  arrived = channel.upload.decode(wire.loads(message))
  np.testing.assert_array_equal(flat(state.optimizer), arrived)


def test_received_is_what_clients_train_on(problem, recorder):
  channel = channels.Channel(
    download=compression.stochastic_uniform(2)
  )  # At random.
  algorithm, step = compose(
    problem.loss_fn, recorder, client=DOUBLE, channel=channel
  )
  state = algorithm.init(problem.trainable)
  cohort = problem.cohort(2, 5, steps=1)
  seen = []
  for _ in range(2):
    received = flat(algorithm.received(state, KEY))
    state, _ = advance(step, state, problem, cohort)
    np.testing.assert_allclose(-flat(state.optimizer), received, rtol=1e-6)
    seen.append(received)
  assert (seen[0] != seen[1]).any()


def of_one(step, state, problem, client, *others):
  """The state after a round in which one of a cohort's clients counts."""
  cohort = problem.cohort(client, *others, steps=1)
  alone = (cohort.clients == client).astype(np.float32)
  state = jax.tree.map(jnp.array, state)  # Else it would be donated.
  state, _ = advance(step, state, problem, cohort._replace(weights=alone))
  return state, cohort


def assert_draws_are_of_client_and_round(start, draw):
  """Of `draw(state, client, *others)`: what was drawn, and the next state."""
  first, later = draw(start, 0, 4, 6)
  np.testing.assert_array_equal(draw(start, 0, 3, 1)[0], first)
  for other in (draw(start, 3, 0, 1)[0], draw(later, 0, 4, 6)[0]):
    # Equal draws differ by rounding, of numbers below one: by less than 1e-6.
    assert abs(other - first).min() > 1e-5


def test_draws_depend_on_the_round_and_the_client_alone(problem, recorder):
  def loss_fn(trainable, frozen, examples, mask, key):
    return jax.random.normal(key, (4,)) @ trainable["head"], mask.sum()

  algorithm, step = compose(loss_fn, recorder)

  def draw(state, *clients):
    state, cohort = of_one(step, state, problem, *clients)
    return state.optimizer["head"] * cohort.mask[0].sum(), state

  assert_draws_are_of_client_and_round(algorithm.init(problem.trainable), draw)


def test_codecs_draw_anew_for_each_client_and_round(problem, recorder):
  # Each upload has its own key. What is sent is only noise from that key.
  noise = base.stateless(
    lambda vector, key: base.Dense(jax.random.normal(key, vector.shape)),
    lambda payload: payload.values,
  )
  algorithm, step = compose(
    problem.loss_fn, recorder, channel=channels.Channel(upload=noise)
  )

  def draw(state, *clients):
    state, _ = of_one(step, state, problem, *clients)
    return flat(state.optimizer), state

  assert_draws_are_of_client_and_round(algorithm.init(problem.trainable), draw)


def test_a_client_that_diverges_keeps_its_memory(problem):
  # A residual that is not finite would spoil all of its later answers.
  algorithm, step = compose(problem.loss_fn, channel=FEEDBACK, population=7)
  cohort = problem.cohort(1, 4, 6)
  rows = cohort.indices[1][cohort.mask[1]]
  broken = jax.tree.map(np.copy, problem.examples)
  broken["y"][rows] = np.inf
  state = algorithm.init(problem.trainable)
  state, _ = advance(step, state, problem, cohort)
  before = jax.device_get(state.upload[0])
  state, metrics = advance(step, state, problem, cohort, examples=broken)
  assert metrics["finite"].tolist() == [True, False, True]
  residual = state.upload[0][0]
  np.testing.assert_array_equal(residual[4], before[0][4])
  assert (residual[1] != before[0][1]).any()
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
  state, metrics = advance(step, state, problem, cohort)
  assert metrics["finite"].all()


def test_what_is_not_finite_cannot_hide_in_a_memory(problem):
  # The only entry that diverges is one that the upload does not send.
  def loss_fn(trainable, *rest):
    total, count = problem.loss_fn(trainable, *rest)
    return total + jnp.inf * trainable["a"][0, 0], count

  sent = np.arange(flat(problem.trainable).size) > 0
  upload = compression.error_feedback(sparse.select(sent))
  channel = channels.Channel(upload=upload)
  algorithm, step = compose(loss_fn, channel=channel, population=7)
  start = algorithm.init(problem.trainable)
  state, metrics = advance(step, start, problem, problem.cohort(2, steps=1))
  assert metrics["finite"].tolist() == [False]
  assert not state.upload[0][0].any()


def test_if_every_client_diverges_the_server_gets_no_update(problem, recorder):
  algorithm, step = compose(problem.loss_fn, recorder)
  broken = jax.tree.map(lambda x: np.full_like(x, np.nan), problem.examples)
  state = algorithm.init(problem.trainable)
  cohort = problem.cohort(0, 4, 6)
  state, metrics = advance(step, state, problem, cohort, examples=broken)
  assert not metrics["finite"].any()
  assert not flat(state.optimizer).any()


def test_an_answer_that_overflows_on_the_way_is_not_finite(problem):
  upload = channels.Channel(upload=compression.cast(jnp.float16))
  algorithm, step = compose(
    problem.loss_fn, client=optax.sgd(1e6), channel=upload
  )
  state = algorithm.init(problem.trainable)
  state, metrics = advance(step, state, problem, problem.cohort(0, steps=1))
  assert metrics["finite"].tolist() == [False]
  assert jnp.isfinite(metrics["train_loss"])
  np.testing.assert_array_equal(
    flat(state.trainable), flat(problem.trainable).astype(np.float32)
  )


def test_memory_is_kept_for_each_client_by_its_number(problem):
  algorithm, step = compose(problem.loss_fn, channel=FEEDBACK, population=7)
  start = algorithm.init(problem.trainable)
  n = flat(start.trainable).size
  assert start.upload[0][0].shape == (7, n)
  state, _ = advance(step, start, problem, problem.cohort(5, 0, 3))
  changed = np.asarray(state.upload[0][0]).any(axis=1)
  assert np.flatnonzero(changed).tolist() == [0, 3, 5]
  before = np.asarray(state.upload[0][0])
  state, _ = advance(step, state, problem, problem.cohort(3, 6, 5))
  changed = (np.asarray(state.upload[0][0]) != before).any(axis=1)
  assert np.flatnonzero(changed).tolist() == [3, 5, 6]


def test_an_answer_contains_what_error_feedback_kept_back(problem, recorder):
  # What arrived in two rounds, plus what is still kept, is all that was sent.
  algorithm, step = compose(
    problem.loss_fn, recorder, DOUBLE, channel=FEEDBACK, population=7
  )
  state = algorithm.init(problem.trainable)
  cohort = problem.cohort(5, steps=1)
  arrived = 0
  for _ in range(2):
    state, _ = advance(step, state, problem, cohort)
    arrived += flat(state.optimizer)
  total = arrived + state.upload[0][0][5]
  np.testing.assert_allclose(total, -2 * flat(state.trainable), rtol=1e-6)


def test_a_memory_for_each_client_needs_the_population(problem):
  algorithm, _ = compose(problem.loss_fn, channel=FEEDBACK)
  with pytest.raises(ValueError, match="expected population=, the number"):
    algorithm.init(problem.trainable)


def test_an_upload_can_use_what_the_download_said(problem, recorder):
  n = flat(problem.trainable).size
  count = n // 2
  held = lambda payload: sparse.top_k(0.5).decode(payload) != 0
  channel = channels.Channel(
    download=sparse.top_k(0.5),
    upload=lambda payload: sparse.select(held(payload), count),
  )
  algorithm, step = compose(problem.loss_fn, recorder, channel=channel)
  state = algorithm.init(problem.trainable)
  mask = flat(algorithm.received(state, KEY)) != 0
  assert mask.sum() == count
  state, metrics = advance(step, state, problem, problem.cohort(2, 5))
  update = flat(state.optimizer)
  assert update[mask].all()
  assert not update[~mask].any()
  # The support costs nothing on the way up.
  alone = wire.dumps(base.Dense(np.zeros(count, np.float32)))
  assert metrics["upload_bytes"].tolist() == [len(alone)] * 2


def test_an_upload_of_unknown_size_is_refused_before_the_round(problem):
  held = lambda payload: sparse.top_k(0.5).decode(payload) != 0
  channel = channels.Channel(
    download=sparse.top_k(0.5),
    upload=lambda payload: sparse.select(held(payload)),
  )
  algorithm, _ = compose(problem.loss_fn, channel=channel)
  with pytest.raises(ValueError, match="needs `count`"):
    algorithm.init(problem.trainable)


def test_a_channel_may_be_made_from_the_trainable_parameters(problem):
  whole = sparse.select(np.ones(flat(problem.trainable).size, bool))
  fixed = channels.Channel(whole, whole)

  def channel(trainable):
    everything = np.ones(ravel_pytree(trainable)[0].size, bool)
    kept = sparse.select(everything)
    return channels.Channel(kept, kept)

  states = []
  for each in (fixed, channel):
    algorithm, step = compose(problem.loss_fn, channel=each)
    start = algorithm.init(problem.trainable)
    states.append(advance(step, start, problem, *problem.cohorts(2))[0])
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_rank_that_was_truncated_away_stays_zero(problem, recorder):
  # If columns of a and rows of b are zero, so are both gradients.
  kept = {"a": np.ones((6, 2)), "b": np.ones((2, 4)), "head": np.ones(4)}
  kept["a"][:, 1:] = kept["b"][1:] = 0
  mask = flat(kept) == 1
  trained = {**problem.trainable, "b": np.full((2, 4), 0.3)}
  channel = channels.Channel(download=sparse.select(mask))
  algorithm, step = compose(problem.loss_fn, recorder, channel=channel)
  state, _ = advance(
    step, algorithm.init(trained), problem, problem.cohort(2, 5)
  )
  update = flat(state.optimizer)
  assert update[mask].all()
  assert not update[~mask].any()


def test_one_tier_of_full_rank_is_the_homogeneous_round(problem):
  everything = sparse.select(np.ones(flat(problem.trainable).size, bool))
  states = []
  for channel in (None, channels.Channel(everything, everything)):
    algorithm, step = compose(problem.loss_fn, channel=channel)
    start = algorithm.init(problem.trainable)
    states.append(advance(step, start, problem, *problem.cohorts(2))[0])
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_frozen_weights_are_neither_constants_nor_batched(problem):
  algorithm, _ = compose(
    problem.loss_fn, placement=placements.on(1, placements.EVERYBODY)
  )
  jaxpr = jax.make_jaxpr(algorithm.round)(
    algorithm.init(problem.trainable),
    problem.frozen,
    problem.examples,
    problem.cohort(0, 4, 6),
    KEY,
  )
  assert all(np.shape(constant) != (6, 4) for constant in jaxpr.consts)
  assert "f32[6,4]" in str(jaxpr)
  assert "f32[3,6,4]" not in str(jaxpr)


def temporary_bytes(cohort, clients_per_step):
  """Memory of a round beside its arguments; a client trains 16 KiB."""
  n, steps = 4096, 2

  def loss_fn(trainable, frozen, examples, mask, key):
    return ((trainable[None] * examples) ** 2).sum() + frozen, mask.sum()

  algorithm = fed_avg.fed_avg(
    loss_fn,
    SGD,
    optax.sgd(1.0),
    placement=placements.on(1, clients_per_step),
  )
  arguments = (
    algorithm.init(jnp.zeros(n)),
    jnp.zeros(()),
    jnp.zeros((8, n)),
    clients.Cohort(
      np.arange(cohort, dtype=np.int32),
      np.zeros((cohort, steps, 1), np.int32),
      np.ones((cohort, steps, 1), bool),
      np.ones(cohort, np.float32),
    ),
    KEY,
  )
  compiled = jax.jit(algorithm.round).lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_clients_per_step_bounds_the_memory_of_a_round():
  in_steps = temporary_bytes(32, 2)
  # What 24 more clients add is a few numbers each, not their parameters.
  assert in_steps - temporary_bytes(8, 2) < 4 * 4096
  # All at once, at least the parameters of 30 more are held.
  assert temporary_bytes(32, placements.EVERYBODY) - in_steps > 30 * 4 * 4096


def test_an_experiment_on_a_mesh_is_compiled_once(problem):
  # A state that the first round moves would make the second compile again.
  algorithm, step = compose(
    problem.loss_fn,
    optax.adam(0.1),
    channel=FEEDBACK,
    population=7,
    placement=placements.on(2, 1),
  )
  state = algorithm.init(problem.trainable)
  advance(step, state, problem, *problem.cohorts(3))
  assert step._cache_size() == 1


def test_the_server_optimizer_gets_the_mean_update_and_the_state(problem):
  # It may remember the parameters it started from: they are not donated twice.
  def update_fn(updates, start, params):
    back = jax.tree.map(lambda p, s: s - p, params, start)
    return back, start

  server = optax.GradientTransformation(lambda params: params, update_fn)
  algorithm, step = compose(problem.loss_fn, server)
  trainable = jax.tree.map(jnp.asarray, problem.trainable)
  state = algorithm.init(trainable)
  state, _ = advance(step, state, problem, *problem.cohorts(2))
  np.testing.assert_array_equal(flat(state.trainable), flat(trainable))


def one_round(problem, **changes):
  """Traces a round of this composition, with nothing compiled or computed."""
  parts = {
    "loss_fn": problem.loss_fn,
    "client_optimizer": SGD,
    "server_optimizer": REPLACE,
    "trainable": problem.trainable,
  } | changes
  trainable = parts.pop("trainable")
  algorithm = fed_avg.fed_avg(**parts, placement=placements.ALONE)
  jax.eval_shape(
    algorithm.round,
    algorithm.init(trainable),
    problem.frozen,
    problem.examples,
    problem.cohort(2, 5),
    KEY,
  )


def halved(decode):
  """A channel whose upload is decoded to another length."""
  return channels.Channel(
    upload=base.stateless(lambda vector, key: base.Dense(vector), decode)
  )


def finishing(finish):
  return aggregators.uniform_mean()._replace(finish=finish)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"server_optimizer": 0.1},
      r"server_optimizer to be an optimizer, .* optax.sgd.*, got 0.1",
    ),
    ({"client_optimizer": 0.1}, "the client's optimizer to be an optimizer"),
    (
      {"aggregate": aggregators.uniform_mean},
      r"an Aggregator, such as uniform_mean\(\), got <function",
    ),
    (
      {"aggregate": finishing(lambda total, state, key: total[0])},
      r"finish .* shapes \(\(\d+,\), \(\)\), got \(\d+,\)",
    ),
    (
      {"aggregate": finishing(lambda total, state, key: (jnp.ones(3), ()))},
      r"finish expected to return .*, got \(\(3,\), \(\)\)",
    ),
    (
      {"loss_fn": lambda trainable, *_: jax.tree.leaves(trainable)[0].sum()},
      "loss_fn to return .total, count., .* divide it by, got a",
    ),
    (
      {"channel": halved(lambda payload: payload.values[:5])},
      "decode to return a vector of .* got shape .5,. from a Dense",
    ),
    (
      {"trainable": {"a": jnp.zeros(3), "b": jnp.arange(3)}},
      r"floating-point type, got int32 at \['b'\]",
    ),
  ],
)
def test_parts_of_another_kind_are_refused_in_words(problem, changes, message):
  with pytest.raises(ValueError, match=message):
    one_round(problem, **changes)


def test_parts_that_fit_are_not_refused(problem):
  one_round(problem, server_optimizer=optax.adam(0.1))
