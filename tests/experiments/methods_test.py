"""Every method that the config `methods` names runs, and is what it says."""

import functools
import pathlib
import typing

import jax
import numpy as np
import pytest

from fedjax_llm.cli import configs
from fedjax_llm.data import cohorts, corpora, records
from fedjax_llm.experiments import knobs, methods, tasks
from fedjax_llm.federated.algorithms import flasc
from fedjax_llm.models import lora
from tests import flat

CONFIG = configs.load("methods")
NAMES = typing.get_args(methods.Method)
TOY = dict(
  rounds=2,
  clients_per_round=2,
  rank=2,
  local_steps=1,
  batch_size=2,
  sequence_length=16,
  held_out_rows=1,
)


@functools.cache
def result(method, model, **changes):
  """The metrics of two rounds, and what is evaluated then."""
  values = TOY | dict(method=method, model=model) | changes
  made = CONFIG.experiment(**flat.grouped(CONFIG.experiment, **values))
  state, lines = made.init(), []
  for number in range(2):
    state, line = made.round(state, number)
    lines.append(line)
  return lines, made.evaluate(state)


def test_the_names_are_those_of_the_table():
  assert NAMES == tuple(methods.METHODS)
  assert set(methods.PRIVATE) <= set(NAMES)


@functools.cache
def task(model):
  adapter = lora.LoRA(2, 2.0, 0.0, ("q_proj", "up_proj"))
  source = records.streams(corpora.standard_library(), 1)
  return tasks.language_model(
    source, model=model, adapter=adapter, sequence_length=16
  )


@pytest.mark.parametrize(
  "name", [name for name in NAMES if name != "linear_probe"]
)
def test_a_method_is_composed(name, toy_model):
  # Traced, not compiled: that the algorithms do as they should is tested with
  # them, here only that each fits a real task, by what the knobs say.
  toy = task(str(toy_model))
  recipe = methods.Recipe(
    toy,
    knobs.Rates(0.1),
    flasc.server_adamw(0.1),
    density=0.25,
    upload_density=0.25,
    rank=2,
    rounds=2,
  )
  algorithm = methods.METHODS[name](recipe)
  sample = cohorts.cohort_sampler(
    toy.population, clients_per_round=2, batch_size=2, local_steps=1, seed=0
  )
  state = algorithm.init(toy.trainable)
  key = jax.random.key(0)
  after, metrics = jax.eval_shape(
    algorithm.round, state, toy.frozen, toy.population.examples, sample(0), key
  )
  shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  assert shapes(after) == shapes(state)
  assert metrics["upload_bytes"].shape == (2,)
  received = jax.eval_shape(algorithm.received, state, key)
  assert shapes(received) == shapes(toy.trainable)


@pytest.mark.parametrize(
  "name", ["full_fine_tuning", "flora", "delta_downloads"]
)
def test_a_method_runs(name, toy_model):
  lines, evaluated = result(name, str(toy_model))
  assert np.isfinite(evaluated["loss"])
  assert all(line["upload_bytes"] > 0 for line in lines)
  # Some download nothing at first that the seed does not tell.
  assert lines[1]["download_bytes"] > 0


def test_a_method_trains_a_head(toy_model, data):
  archive = data / "20news_bydate" / "20news-bydate.tar.gz"
  lines, evaluated = result("linear_probe", str(toy_model), data=str(archive))
  assert "macro_f1" in evaluated
  # 20 groups of the toy's 16 features, and a few bytes of header.
  assert 0 <= lines[0]["upload_bytes"] - 2 * 4 * 20 * 16 < 2 * 200


@pytest.mark.parametrize("name", ["flasc", "ffa_lora"])
def test_a_method_is_private(name, toy_model):
  _, evaluated = result(name, str(toy_model), epsilon=8.0, delta=1e-3)
  assert 7.9 < evaluated["epsilon"] <= 8.0


def test_a_method_that_cannot_be_private_is_refused(toy_model):
  with pytest.raises(ValueError, match="epsilon expected a method of .*flora"):
    result("flora", str(toy_model), epsilon=1.0)


def test_a_run_over_links_takes_time(toy_model):
  lines, _ = result(
    "flasc", str(toy_model), links="asymmetric", dropout_during=0.5
  )
  assert all(line["simulated_seconds"] > 0 for line in lines)
  assert all(line["answered"] <= line["selected"] for line in lines)


def test_the_docs_tell_of_every_method():
  docs = pathlib.Path(__file__).parents[2] / "docs" / "methods.md"
  text = docs.read_text(encoding="utf-8")
  assert [name for name in NAMES if f"`{name}`" not in text] == []
