"""Recording and fitting, at toy size."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from fedjax_llm.cli import configs
from fedjax_llm.codecs import (
  autoencoder,
  files,
  fitting,
  layouts,
  recording,
  row_network,
  transforms,
)
from fedjax_llm.compression import base
from fedjax_llm.data import records
from fedjax_llm.experiments import finetuning, runner, tasks
from fedjax_llm.experiments import tgap as experiments
from fedjax_llm.federated import network, parameters
from fedjax_llm.federated.algorithms import tgap
from fedjax_llm.models import lora

TOY = configs.load(str(pathlib.Path(__file__).parent.parent / "toy_config.py"))
SGD = optax.sgd(0.1, momentum=0.9)
SCHEDULE = finetuning.Schedule(
  rounds=4,
  clients_per_round=3,
  batch_size=2,
  local_steps=2,
  evaluate_every=2,
  checkpoint_every=2,
)


@pytest.fixture(scope="module")
def halves(toy_model):
  """A task on D1, and on D2."""
  whole = tasks.language_model(
    records.streams(TOY.corpus(), held_out_rows=1),
    model=str(toy_model),
    adapter=lora.LoRA(rank=2, alpha=4.0),
    sequence_length=8,
  )
  return experiments.divided(whole, 0.3, seed=0)


@pytest.fixture(scope="module")
def task(halves):
  return halves[0]


def test_tasks_are_divided_with_their_rows_and_say_so(halves):
  # The rows are numbered, so no two rows are equal.
  first, second = (
    {tuple(row) for row in half.population.examples.tokens.tolist()}
    for half in halves
  )
  assert first and second and not first & second
  assert halves[0].data["part"] != halves[1].data["part"]


def recorded(task, finish=lambda store, folder: None, **knobs):
  algorithm = tgap.federated_pretraining(
    task.loss_fn,
    SGD,
    optax.sgd(1.0),
    population=6,
    placement=task.placement,
  )
  knobs = {"representation": "delta", "about": {"share": 0.3}} | knobs
  return experiments.recorded(task, algorithm, SCHEDULE, finish=finish, **knobs)


@pytest.fixture(scope="module")
def made(task):
  return recorded(task)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
  """A run that was not interrupted."""
  folder = tmp_path_factory.mktemp("recorded")
  runner.run(made, folder)
  return folder


@pytest.fixture(scope="module")
def store(folder):
  return recording.Store(folder / "recording")


def test_all_updates_of_all_rounds_are_recorded(task, store):
  assert np.bincount(store.rounds).tolist() == [3] * 4
  entries = sum(x.size for x in jax.tree.leaves(task.trainable))
  assert store.snapshots.shape == (12, entries)
  assert (np.abs(store.snapshots).max(axis=1) > 0).all()
  assert store.about["share"] == 0.3
  assert store.about["signature"] == parameters.signature(task.trainable)


def test_a_killed_recording_goes_on_bit_for_bit(made, store, tmp_path):
  # The third round is recorded, then lost with its state.
  def killed(state, number):
    if number == 3:
      raise RuntimeError("killed")
    return made.round(state, number)

  with pytest.raises(RuntimeError, match="killed"):
    runner.run(dataclasses.replace(made, round=killed), tmp_path)
  assert len(recording.Store(tmp_path / "recording")) == 9
  runner.run(made, tmp_path)
  again = recording.Store(tmp_path / "recording")
  np.testing.assert_array_equal(again.snapshots, store.snapshots)
  np.testing.assert_array_equal(again.clients, store.clients)


def test_of_a_gaussian_prior_no_update_is_kept(task, store, tmp_path):
  runner.run(recorded(task, source="gaussian_prior"), tmp_path)
  drawn = recording.Store(tmp_path / "recording")
  assert drawn.snapshots.shape == store.snapshots.shape
  assert (drawn.snapshots != store.snapshots).mean() > 0.99
  # As large as the updates: of 224 entries times 12, within a few per cent.
  ratio = np.linalg.norm(drawn.snapshots) / np.linalg.norm(store.snapshots)
  assert 0.8 < ratio < 1.25


def test_who_does_not_answer_is_not_recorded(task, tmp_path):
  tiers = (network.Link(10, 10),)
  links = network.Network(tiers=tiers, dropout_during=0.5, seed=0)
  runner.run(recorded(task, network=links), tmp_path)
  lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  answered = [line["answered"] for line in lines if "answered" in line]
  assert sum(answered) < 3 * len(answered)
  store = recording.Store(tmp_path / "recording")
  assert np.bincount(store.rounds, minlength=4).tolist() == answered
  assert (np.abs(store.snapshots).max(axis=1) > 0).all()


def test_another_source_is_refused(task):
  with pytest.raises(ValueError, match="'gaussian_prior', got 'prior'"):
    recorded(task, source="prior")


def fit_rows(task, store, folder, steps=20):
  """Fits an autoencoder and returns the folder that it is in."""
  finish = experiments.fit_autoencoder(
    layouts.columns(task.trainable, width=16),
    row_network.network(16, latents=8, bits=None),
    fitting.Settings(steps=steps, evaluate_every=10),
  )
  finish(store, folder)
  return folder / "codec"


def fit_transform(task, store, folder, bits=8.0):
  """The same with a transform. Of so few entries headers take six bits."""
  experiments.fit_transform(task.trainable, bits)(store, folder)
  return folder / "codec"


@pytest.fixture(scope="module")
def codec_folder(task, store, folder):
  return fit_rows(task, store, folder)


@pytest.fixture(scope="module")
def transform_folder(task, store, tmp_path_factory):
  return fit_transform(task, store, tmp_path_factory.mktemp("transform"))


def test_an_autoencoder_is_fitted_written_and_read(task, store, codec_folder):
  codec, about = files.load(codec_folder, task.trainable)
  assert about["snapshots"] == len(store) == 12
  assert about["representation"] == "delta" and about["share"] == 0.3
  assert "constant_mean" in (codec_folder / "report.txt").read_text()
  code, vector = autoencoder.autoencoder(codec), store.snapshots[0]
  state, key = code.init(vector), jax.random.key(0)
  error = base.transmit(code, vector, state, key).received - vector
  assert np.sum(error**2) < np.sum(vector**2)


def test_a_stopped_fit_goes_on(task, store, codec_folder, tmp_path):
  for steps in (10, 20):
    again = fit_rows(task, store, tmp_path, steps)
  encoders = [
    files.load(x, task.trainable)[0].encoder for x in (codec_folder, again)
  ]
  jax.tree.map(np.testing.assert_array_equal, *encoders)


def test_what_was_fitted_to_a_part_does_not_stand_in_the_way(
  task, store, tmp_path
):
  # As of a run that was exported before its end.
  part = recording.Store.create(tmp_path / "recording", task.trainable)
  for number in range(4):
    vectors = store.snapshots[3 * number : 3 * number + 3]
    part.append(number, clients=range(3), weights=[1] * 3, vectors=vectors)
    if number > 1:
      folder = fit_rows(task, part, tmp_path, 4)
      _, about = files.load(folder, task.trainable)
      assert about["snapshots"] == 3 * number + 3


def test_a_codec_that_transmits_nothing_says_so(
  task, store, transform_folder, tmp_path, capsys
):
  files.load(transform_folder, task.trainable)
  assert "warning" not in capsys.readouterr().out
  # Where clients are alike, their mean is a better guess than a few bits.
  alike = recording.Store.create(tmp_path / "alike", task.trainable)
  generator = np.random.default_rng(1)
  shared = generator.standard_normal(store.about["size"])
  for number in range(4):
    vectors = shared + 1e-2 * generator.standard_normal((3, shared.size))
    alike.append(number, clients=range(3), weights=[1] * 3, vectors=vectors)
  folder = fit_transform(task, alike, tmp_path, 7.0)
  told = capsys.readouterr().out
  assert "no better than one that transmits nothing" in told
  files.load(folder, task.trainable)
  again = capsys.readouterr().out
  assert again.startswith(f"warning: {folder}: this codec")
  assert "eden(0.5" in again


def test_a_transform_is_fitted_to_rounds_that_do_not_judge_it(
  task, store, transform_folder
):
  found, about = files.load(transform_folder, task.trainable)
  # Of four rounds one is a fifth, rounded up.
  expected = transforms.fit(store.snapshots[:9], task.trainable)
  assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
  assert about["snapshots"] == 12
  report = (transform_folder / "report.txt").read_text()
  assert "constant_mean" in report and "bits an entry" in report
