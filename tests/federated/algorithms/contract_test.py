"""What every algorithm promises: one table, and the laws of all its rows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import pca
from fedjax_llm.compression import sparse
from fedjax_llm.federated import channels, clients, codec_state
from fedjax_llm.federated.algorithms import (
  cg_fed_llm,
  delta_downloads,
  eco_lora,
  ef21,
  fed_avg,
  fed_ex_lora,
  fed_sa_lora,
  fed_sb,
  fed_srd,
  federated_select,
  fetch_sgd,
  flasc,
  flex_lora,
  flora,
  freezing,
  het_lora,
  pruning,
  scaffold,
)
from fedjax_llm.federated.privacy import mechanisms
from tests import placements

KEY = jax.random.key(9)
CLIENT = optax.sgd(0.05, momentum=0.9)
REPLACE = optax.sgd(1.0)
FALLING = {0: 1.0, 2: 0.75, 4: 0.5}


def avg(server=REPLACE, client=CLIENT, **fixed):
  return lambda loss_fn, **parts: fed_avg.fed_avg(
    loss_fn, client, server, **fixed, **parts
  )


def sparse_method(make, **knobs):
  """With the server optimizer of FLASC."""
  server = flasc.server_adamw(0.05)
  return lambda loss_fn, **parts: make(
    loss_fn, CLIENT, server, **knobs, **parts
  )


def averaging(make, **knobs):
  """With a server that replaces what it has by the mean."""
  return lambda loss_fn, **parts: make(
    loss_fn, CLIENT, REPLACE, **knobs, **parts
  )


EIGHT_BITS = compression.error_feedback(compression.stochastic_uniform(8))


def rank_method(make, *server, **knobs):
  """Of clients of ranks 1 and 2."""
  return lambda loss_fn, **parts: make(
    loss_fn, CLIENT, *server, ranks=(1, 2), **knobs, **parts
  )


def residual_method(make, **knobs):
  """With a kernel to add to, which the toy problem calls `w`."""

  def algorithm(loss_fn, **parts):
    def on_kernel(trainable, frozen, *batch):
      return loss_fn(trainable, {"w": frozen["kernel"]}, *batch)

    inner = make(
      on_kernel,
      CLIENT,
      scale=1.0,
      upload=EIGHT_BITS,
      population=7,
      **knobs,
      **parts,
    )

    def round_fn(state, frozen, *rest):
      return inner.round(state, {"kernel": frozen["w"]}, *rest)

    return inner._replace(round=round_fn)

  return algorithm


# Random messages, and clients that remember what theirs lost.
FEEDBACK = channels.Channel(
  compression.stochastic_uniform(8),
  compression.error_feedback(
    compression.chain(sparse.top_k(0.25), compression.stochastic_uniform(4))
  ),
)

PRIVATE = mechanisms.private_mean(
  clip_norm=1.0, noise_multiplier=0.05, clients=3
)
ADAPTIVE = mechanisms.adaptive_private_mean(
  initial_clip_norm=1.0,
  quantile=0.5,
  noise_multiplier=0.05,
  count_noise=0.15,
  clients=3,
)


def codec_method(make, *server, **knobs):
  """Through a linear codec of half of the toy's entries, that has no mean."""
  rows, _ = np.linalg.qr(np.random.default_rng(3).normal(0, 1, (24, 12)))
  return lambda loss_fn, **parts: make(
    loss_fn,
    CLIENT,
    *server,
    coding=codec_state.Coding(
      pca.Basis(np.zeros(24, np.float32), np.float32(rows.T)), pca.pca, 100
    ),
    population=7,
    **knobs,
    **parts,
  )


# Each makes an algorithm from a loss and the placement of clients.
ALGORITHMS = {
  "FedAvg": avg(),
  "FedAvgM": avg(fed_avg.fed_avg_m(0.3)),
  "FedAdam": avg(fed_avg.fed_adam(0.05)),
  "FedYogi": avg(fed_avg.fed_yogi(0.05)),
  "FedAdagrad": avg(fed_avg.fed_adagrad(0.1)),
  "Adam of optax": avg(optax.adam(0.05, b2=0.99, eps=1e-3)),
  "FedProx": avg(client=optax.chain(clients.proximal(0.1), CLIENT)),
  "SCAFFOLD": lambda loss_fn, **parts: scaffold.scaffold(
    loss_fn, 0.05, REPLACE, channel=FEEDBACK, population=7, **parts
  ),
  "FLASC": sparse_method(
    flasc.flasc, download_density=0.5, upload_density=0.25
  ),
  "FLASC by round": sparse_method(
    flasc.flasc, download_density=FALLING, upload_density={0: 0.5, 1: 0.25}
  ),
  "FLASC tiers": sparse_method(
    flasc.flasc_tiers, tiers=((0.25, 0.25), (0.5, 0.25), (1.0, 0.5))
  ),
  "Federated Select": sparse_method(
    federated_select.federated_select, density=0.5
  ),
  "Federated Select, ranks": sparse_method(
    federated_select.federated_select_ranks, ranks=(1, 2)
  ),
  "SparseAdapter": sparse_method(pruning.sparse_adapter, density=0.5),
  "Adapter-LTH": sparse_method(pruning.adapter_lth, density=FALLING),
  "zero-padded HetLoRA": rank_method(het_lora.zero_padded_lora, REPLACE),
  "HetLoRA": rank_method(het_lora.het_lora, REPLACE, decay=0.5, population=7),
  "FlexLoRA": rank_method(flex_lora.flex_lora),
  "FLoRA": residual_method(flora.flora, ranks=(1, 2)),
  "FedEx-LoRA": residual_method(fed_ex_lora.fed_ex_lora),
  "EcoLoRA": averaging(
    eco_lora.eco_lora,
    segment_count=2,
    a_densities=(0.25, 0.5),
    b_densities=(0.5, 1.0),
    population=7,
  ),
  "FedSRD": lambda loss_fn, **parts: fed_srd.fed_srd(
    loss_fn,
    CLIENT,
    upload_density=0.5,
    download_density=0.75,
    population=7,
    **parts,
  ),
  "error feedback": avg(channel=FEEDBACK, population=7),
  "EF21": averaging(ef21.ef21, upload=sparse.top_k(0.5), population=7),
  "FetchSGD": lambda loss_fn, **parts: fetch_sgd.fetch_sgd(
    loss_fn,
    CLIENT,
    population=7,
    rows=3,
    columns=16,
    density=0.25,
    momentum=0.5,
    **parts,
  ),
  "private mean": avg(aggregate=PRIVATE),
  "adaptive private mean": avg(aggregate=ADAPTIVE),
  "FFA-LoRA": averaging(freezing.ffa_lora),
  "linear probe": averaging(freezing.linear_probe),
  "RoLoRA": averaging(freezing.ro_lora),
  "FedSA-LoRA": averaging(fed_sa_lora.fed_sa_lora, population=7),
  "Fed-SB": averaging(fed_sb.fed_sb, bases=fed_sb.random_bases(KEY)),
  "CG-FedLLM": codec_method(cg_fed_llm.cg_fed_llm, REPLACE),
  "CG-FedLLM, refitted": codec_method(
    cg_fed_llm.cg_fed_llm,
    REPLACE,
    representation="state",
    volunteers=[True, False] * 3 + [True],
  ),
  "CG-FedLLM, products": codec_method(cg_fed_llm.cg_fed_llm_products),
  "delta downloads": lambda loss_fn, **parts: delta_downloads.delta_downloads(
    loss_fn,
    CLIENT,
    flasc.server_adamw(0.05),
    download=compression.lloyd_max(3, block=8),
    upload=compression.error_feedback(sparse.top_k(0.5)),
    population=7,
    **parts,
  ),
}
each_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@functools.cache
def program(name, loss_fn, **placement):
  """An algorithm and its round, compiled once for all tests."""
  placement = placement or {"placement": placements.ALONE}
  algorithm = ALGORITHMS[name](loss_fn, **placement)
  return algorithm, jax.jit(algorithm.round, donate_argnums=0)


# Methods whose mean counts every client once, or weights it by norms.
COUNTED_ONCE = {
  "SCAFFOLD",
  "FLASC",
  "FLASC by round",
  "FLASC tiers",
  "Federated Select",
  "Federated Select, ranks",
  "SparseAdapter",
  "Adapter-LTH",
  "zero-padded HetLoRA",
  "HetLoRA",
  "FedEx-LoRA",
  "EF21",
  "FetchSGD",
  "private mean",
  "adaptive private mean",
  "delta downloads",
}
# Methods that take no `aggregate`, or have it set above.
WITHOUT_AGGREGATE = {
  "SCAFFOLD",
  "HetLoRA",
  "FlexLoRA",
  "FLoRA",
  "FedEx-LoRA",
  "EcoLoRA",
  "FedSRD",
  "EF21",
  "FetchSGD",
  "private mean",
  "adaptive private mean",
  "CG-FedLLM, products",
}


class Run(NamedTuple):
  """What went over rounds with different cohorts, on the host."""

  states: list
  metrics: list


def play(problem, name, cohorts, state=None, examples=None, **placement):
  algorithm, step = program(name, problem.loss_fn, **placement)
  state = algorithm.init(problem.trainable) if state is None else state
  # The host's copies are of the states before they are donated.
  run = Run([jax.tree.map(np.array, state)], [])
  examples = problem.examples if examples is None else examples
  for cohort in cohorts:
    state, metrics = step(state, problem.frozen, examples, cohort, KEY)
    run.states.append(jax.tree.map(np.array, state))
    run.metrics.append(jax.device_get(metrics))
  return run


def loss(problem, trainable, residual=None):
  everyone = np.ones(len(problem.examples["y"]), bool)
  delta = 0 if residual is None else residual["delta"]
  frozen = {"w": problem.frozen["w"] + delta}
  arguments = (frozen, problem.examples, everyone, KEY)
  return float(problem.loss_fn(trainable, *arguments)[0])


def assert_same_bits(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def assert_close(got, expected):
  # Float32 in another order of additions, over a few rounds.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, got, expected)


@each_algorithm
def test_an_experiment_is_compiled_once_and_only_values_change(problem, name):
  run = play(problem, name, problem.cohorts(4))
  _, step = program(name, problem.loss_fn)
  assert step._cache_size() == 1
  shapes = [
    jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in run.states
  ]
  assert all(shape == shapes[0] for shape in shapes)
  assert [int(state.round) for state in run.states] == [0, 1, 2, 3, 4]


@each_algorithm
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(problem, name):
  # The state has left the device. This also tests that runs are deterministic.
  cohorts = problem.cohorts(4)
  whole = play(problem, name, cohorts)
  saved = jax.device_put(whole.states[2])
  resumed = play(problem, name, cohorts[2:], saved)
  assert_same_bits(resumed.states, whole.states[2:])
  assert_same_bits(resumed.metrics, whole.metrics[2:])


@each_algorithm
def test_the_metrics_are_of_the_whole_cohort(problem, name):
  cohort = problem.cohort(2, 0, 5)
  metrics, later = play(problem, name, [cohort, cohort]).metrics
  assert metrics["tokens"] == cohort.mask.sum() == 8 + 1 + 7
  assert metrics["finite"].tolist() == [True] * 3
  for direction in ("download_bytes", "upload_bytes"):
    assert metrics[direction].shape == (3,)
    assert metrics[direction].dtype == np.int32
    # Some download nothing at first that the seed does not tell.
    assert (later[direction] > 0).all()
  assert (metrics["upload_bytes"] > 0).all()
  alone = [
    play(problem, name, [cohort._replace(mask=only(cohort, i))]).metrics[0]
    for i in range(3)
  ]
  losses = [one["train_loss"] * one["tokens"] for one in alone]
  mean = sum(losses) / metrics["tokens"]
  np.testing.assert_allclose(metrics["train_loss"], mean, rtol=1e-5)


def only(cohort, i):
  return cohort.mask & (np.arange(len(cohort.mask)) == i)[:, None, None]


@each_algorithm
def test_the_order_of_clients_matters_only_to_rounding(problem, name):
  cohort = problem.cohort(3, 6, 1)
  turned = jax.tree.map(lambda x: x[::-1], cohort)
  runs = [play(problem, name, [each]) for each in (cohort, turned)]
  assert_close(runs[0].states, runs[1].states)


@each_algorithm
def test_a_client_that_diverges_is_one_that_is_not_there(problem, name):
  cohort = problem.cohort(3, 4, 1)
  rows = cohort.indices[1][cohort.mask[1]]
  broken = jax.tree.map(np.copy, problem.examples)
  broken["x"][rows] = np.nan
  got = play(problem, name, [cohort], examples=broken)
  assert got.metrics[0]["finite"].tolist() == [True, False, True]
  leaves = jax.tree.leaves(got.states[-1])
  assert all(np.isfinite(leaf).all() for leaf in leaves)
  weights = cohort.weights * np.array([1, 0, 1], np.float32)
  absent = play(problem, name, [cohort._replace(weights=weights)])
  assert_same_bits(got.states[-1], absent.states[-1])


@each_algorithm
def test_a_round_of_nobody_changes_nothing_but_its_number(problem, name):
  cohort = problem.cohort(2, 5, 4)
  nobody = cohort._replace(weights=np.zeros(3, np.float32))
  *_, before, after = play(problem, name, [cohort, nobody]).states
  pairs = zip(
    jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True
  )
  name_of = functools.partial(jax.tree_util.keystr, simple=True)
  changed = [name_of(path[-1:]) for (path, x), y in pairs if (x != y).any()]
  # Noise must not tell that nobody was there.
  assert (changed == ["round"]) == ("private" not in name)


@each_algorithm
def test_training_lowers_the_loss_and_leaves_the_caller_s_arrays(problem, name):
  # Donating the state must not delete what it was made from.
  trainable = jax.tree.map(jnp.asarray, problem.trainable)
  mine = problem._replace(trainable=trainable)
  run = play(mine, name, problem.cohorts(15))
  algorithm, _ = program(name, problem.loss_fn)
  last = run.states[-1]
  residual = algorithm.residual and algorithm.residual(last)
  trained = loss(problem, last.trainable, residual)
  assert trained < 0.8 * loss(mine, trainable)


@each_algorithm
def test_clients_weigh_as_their_method_says(problem, name):
  cohort = problem.cohort(2, 5, 4)
  heavier = cohort._replace(weights=cohort.weights * np.float32([3, 1, 1]))
  got, other = (play(problem, name, [each]) for each in (cohort, heavier))
  pairs = zip(*map(jax.tree.leaves, (got.states, other.states)), strict=True)
  is_same = all(np.array_equal(*pair) for pair in pairs)
  assert is_same == (name in COUNTED_ONCE)


@each_algorithm
def test_a_weight_that_counts_no_examples_leaves_the_client_out(problem, name):
  cohort = problem.cohort(3, 4, 1)
  got, absent = (
    play(problem, name, [cohort._replace(weights=np.float32(weights))])
    for weights in ([np.nan, 2, np.inf], [0, 2, 0])
  )
  assert_same_bits(got.states[-1], absent.states[-1])


@pytest.mark.parametrize(
  "name", [name for name in ALGORITHMS if name not in WITHOUT_AGGREGATE]
)
def test_a_private_mean_tells_its_noise_through_every_method(problem, name):
  algorithm = ALGORITHMS[name](problem.loss_fn, aggregate=PRIVATE)
  # What clients keep to themselves reaches the parameters without noise.
  expected = None if name == "FedSA-LoRA" else PRIVATE.noise_multiplier
  assert algorithm.noise_multiplier == expected


@pytest.mark.parametrize("name", sorted(WITHOUT_AGGREGATE))
def test_the_other_methods_take_no_private_mean(problem, name):
  with pytest.raises(TypeError, match="aggregate"):
    ALGORITHMS[name](problem.loss_fn, aggregate=PRIVATE)
  algorithm, _ = program(name, problem.loss_fn)
  is_private = name in ("private mean", "adaptive private mean")
  assert algorithm.noise_multiplier == (0.05 if is_private else None)


@each_algorithm
def test_no_method_forgets_its_placement(problem, name):
  algorithm, _ = program(name, problem.loss_fn)
  assert algorithm.placement == placements.ALONE


@pytest.mark.parametrize(
  ("name", "devices", "clients_per_step"),
  [
    ("FLASC", 1, placements.EVERYBODY),
    ("FLASC", 2, 2),
    ("error feedback", 1, 2),
    ("error feedback", 2, 1),
    ("SCAFFOLD", 2, 2),
    ("EcoLoRA", 1, 2),
    ("FedSRD", 2, 2),
    ("FLoRA", 2, 2),
    ("CG-FedLLM", 2, 2),
    ("CG-FedLLM, refitted", 2, 2),
    ("FlexLoRA", 2, 2),
    ("HetLoRA", 1, placements.EVERYBODY),
    ("FedSA-LoRA", 2, 2),
    ("FFA-LoRA", 2, 1),
    ("EF21", 2, 1),
    ("FetchSGD", 2, 2),
  ],
)
def test_placements_agree(problem, name, devices, clients_per_step):
  # The reference trains three clients one by one. The others train them in
  # steps of two, all at once, and on two devices.
  placement = dict(placement=placements.on(devices, clients_per_step))
  cohorts = problem.cohorts(2)
  got = play(problem, name, cohorts, **placement)
  expected = play(problem, name, cohorts)
  assert_close(got.states, expected.states)
  assert_close(got.metrics, expected.metrics)
  _, step = program(name, problem.loss_fn, **placement)
  assert step._cache_size() == 1


def test_a_compiled_round_is_the_round(problem, name="FedAvg"):
  algorithm, _ = program(name, problem.loss_fn)
  (cohort,) = problem.cohorts(1)
  arguments = (problem.frozen, problem.examples, cohort, KEY)
  state, metrics = algorithm.round(
    algorithm.init(problem.trainable), *arguments
  )
  compiled = play(problem, name, [cohort])
  assert_close(jax.tree.map(np.array, state), compiled.states[-1])
  assert_close(metrics, compiled.metrics[-1])
