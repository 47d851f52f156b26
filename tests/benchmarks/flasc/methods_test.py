"""Methods of the study are what its result files say."""

import json

import jax
import numpy as np
import optax
import pytest

from benchmarks import problems, study
from benchmarks.flasc import methods
from fedjax_llm.data import cohorts, corpora, records
from fedjax_llm.experiments import tasks
from fedjax_llm.federated.algorithms import fed_avg
from fedjax_llm.models import lora
from tests import placements


@pytest.fixture(scope="module")
def task(toy_model):
  return tasks.language_model(
    records.streams(corpora.standard_library(), 1),
    model=toy_model,
    adapter=lora.LoRA(4, 4.0, targets=("q_proj",)),
    sequence_length=16,
    placement=placements.ALONE,
  )


def cell(method, **knobs):
  return study.Cell(
    *("library", method, 0.25, 4, 0, 0.1, 0.01, 6), knobs=tuple(knobs.items())
  )


def cohort_of(task):
  sample = cohorts.cohort_sampler(
    task.population, clients_per_round=2, batch_size=2, local_steps=1, seed=0
  )
  return sample(0)


def test_every_method_of_a_result_file_is_known():
  named = set()
  for path in (study.RESULTS / "flasc").glob("*.jsonl"):
    lines = map(json.loads, path.read_text().splitlines())
    named |= {line["cell"]["method"] for line in lines}
  assert named and named <= methods.METHODS.keys()


PRIVATE = dict(epsilon=8.0, delta=1e-5, cohort_factor=100, clients_per_round=2)


@pytest.mark.parametrize(
  "name",
  [
    *("dense", "FLASC, factors apart", "FLASC, what moved", "coarse"),
    *("SparseAdapter, one Top-K", "Federated Select, one Top-K"),
    *("Federated Select, no warm-up", "compact, b alone", "FLASC, private"),
  ],
)
def test_a_variant_fits_a_real_task(task, name):
  knobs = PRIVATE if "private" in name else {}
  recipe = methods.recipe_of(cell(name, **knobs), task, knobs)
  algorithm = problems.equal_clients(methods.METHODS[name](recipe))
  assert (algorithm.noise_multiplier is not None) == ("private" in name)
  state = algorithm.init(task.trainable)
  arguments = (task.frozen, task.population.examples, cohort_of(task))
  after, metrics = jax.eval_shape(
    algorithm.round, state, *arguments, jax.random.key(0)
  )
  shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  assert shapes(after) == shapes(state)
  assert metrics["upload_bytes"].shape == (2,)


def test_clients_of_the_study_weigh_alike(task):
  algorithm = fed_avg.fed_avg(
    task.loss_fn,
    optax.sgd(0.1),
    optax.sgd(1.0),
    placement=placements.ALONE,
  )
  cohort = cohort_of(task)
  assert len(set(cohort.weights)) == 2
  equal = cohort._replace(weights=np.ones(2, np.float32))

  def trained(algorithm, cohort):
    state = algorithm.init(task.trainable)
    arguments = (task.frozen, task.population.examples, cohort)
    state, _ = jax.jit(algorithm.round)(state, *arguments, jax.random.key(0))
    return np.concatenate([x.ravel() for x in jax.tree.leaves(state.trainable)])

  expected = trained(algorithm, equal)
  got = trained(problems.equal_clients(algorithm), cohort)
  np.testing.assert_array_equal(got, expected)
  assert np.any(trained(algorithm, cohort) != expected)


def test_private_cells_are_of_poisson_cohorts():
  assert problems.schedule(cell("dense"), {}).sampling == "fixed"
  assert problems.schedule(cell("dense"), PRIVATE).sampling == "poisson"
