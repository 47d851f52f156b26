"""Methods of the study are what its result files say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import problems, study
from benchmarks.flasc import methods
from fedjax_llm.data import cohorts, corpora, records
from fedjax_llm.experiments import tasks
from fedjax_llm.federated import clients
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
    *("FLASC, 4 bits", "FLASC, 4 bits, EDEN up", "FLASC, 4 bits, trellis up"),
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


def test_clients_of_the_study_weigh_alike():
  def loss_fn(trainable, frozen, examples, mask, key):
    errors = jnp.square(trainable["w"] - examples)
    return jnp.where(mask, errors, 0).sum(), mask.sum()

  # One client has a 0, the other three times a 4.
  examples = np.array([0, 4, 4, 4], np.float32)
  cohort = clients.Cohort(
    np.arange(2, dtype=np.int32),
    np.array([[[0, 0, 0]], [[1, 2, 3]]], np.int32),
    np.array([[[True, False, False]], [[True, True, True]]]),
    np.array([1, 3], np.float32),
  )
  # One step of half the gradient leads each client to its own mean.
  algorithm = fed_avg.fed_avg(
    loss_fn, optax.sgd(0.5), optax.sgd(1.0), placement=placements.ALONE
  )

  def trained(algorithm):
    state = algorithm.init({"w": jnp.zeros(())})
    arguments = ({}, examples, cohort, jax.random.key(0))
    return float(jax.jit(algorithm.round)(state, *arguments)[0].trainable["w"])

  assert trained(algorithm) == pytest.approx(3)
  assert trained(problems.equal_clients(algorithm)) == pytest.approx(2)


def test_private_cells_are_of_poisson_cohorts():
  assert problems.schedule(cell("dense"), {}).sampling == "fixed"
  assert problems.schedule(cell("dense"), PRIVATE).sampling == "poisson"
