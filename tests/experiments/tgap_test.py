"""Recording, fitting, loading and fitting anew, at toy size."""

import dataclasses
import functools
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
from fedjax_llm.compression import base, wire
from fedjax_llm.data import records
from fedjax_llm.experiments import finetuning, runner, tasks
from fedjax_llm.experiments import tgap as experiments
from fedjax_llm.federated import codec_state, network, parameters
from fedjax_llm.federated.algorithms import cg_fed_llm, tgap
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
  # Numbers are counted on, so no row is like another.
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
  experiments.fit_autoencoder(
    store,
    folder,
    layout=layouts.columns(task.trainable, width=16),
    network=row_network.network(16, latents=8, bits=None),
    settings=fitting.Settings(steps=steps, evaluate_every=10),
  )
  return folder / "codec"


def fit_transform(task, store, folder, bits=8.0):
  """The same with a transform. Of so few entries headers take six bits."""
  experiments.fit_transform(store, folder, trainable=task.trainable, bits=bits)
  return folder / "codec"


@pytest.fixture(scope="module")
def codec_folder(task, store, folder):
  return fit_rows(task, store, folder)


@pytest.fixture(scope="module")
def transform_folder(task, store, tmp_path_factory):
  return fit_transform(task, store, tmp_path_factory.mktemp("transform"))


def sent(coding, vector):
  """A vector as it arrives."""
  code = coding.compressor_of(coding.codec)
  key = jax.random.key(0)
  return base.transmit(code, vector, code.init(vector), key).received


def test_an_autoencoder_is_fitted_written_and_read(task, store, codec_folder):
  codec, about = files.load(codec_folder, task.trainable)
  assert about["snapshots"] == len(store) == 12
  assert about["representation"] == "delta" and about["share"] == 0.3
  assert "constant_mean" in (codec_folder / "report.txt").read_text()
  coding = experiments.coding(codec, is_refitted=True)
  assert coding.codec is codec
  assert coding.setup_bytes == autoencoder.setup_bytes(codec)
  assert coding.signature == parameters.signature(task.trainable)
  vector = store.snapshots[0]
  error = sent(coding, vector) - vector
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


def test_a_transform_is_coded_for_means_or_for_each_message(
  task, store, transform_folder
):
  codec, _ = files.load(transform_folder, task.trainable)
  vector, told, errors = store.snapshots[0], {}, {}
  for unbiased in (True, False):
    coding = experiments.coding(codec, bits=8.0, unbiased=unbiased)
    assert coding.setup_bytes == transforms.setup_bytes(codec)
    received = sent(coding, vector)
    told[unbiased] = float(received @ vector / (vector @ vector))
    error = np.sum((received - vector) ** 2) / (vector @ vector)
    errors[unbiased] = float(error)
  assert told[True] == pytest.approx(1, abs=0.01)
  # A code of least error is shorter than the vector by its error.
  assert told[False] == pytest.approx(1 - errors[False], abs=0.01)
  assert errors[False] < errors[True]


def test_a_transform_is_not_fitted_anew(task, transform_folder):
  codec, _ = files.load(transform_folder, task.trainable)
  with pytest.raises(ValueError, match="expected an autoencoder to fit anew"):
    experiments.coding(codec, is_refitted=True)


def test_clients_fetch_a_transform_once(task, transform_folder):
  codec, _ = files.load(transform_folder, task.trainable)
  coding = experiments.coding(codec, bits=8.0)
  algorithm = cg_fed_llm.cg_fed_llm(
    task.loss_fn,
    SGD,
    optax.sgd(1.0),
    coding=coding,
    population=6,
    placement=task.placement,
  )
  schedule = dataclasses.replace(SCHEDULE, clients_per_round=6)
  made = finetuning.fine_tuning(task, algorithm, schedule)
  size = sum(x.size for x in jax.tree.leaves(task.trainable))
  state, lines = made.init(), []
  for number in range(2):
    state, line = made.round(state, number)
    lines.append(line)
  first, second = (line["download_bytes"] for line in lines)
  assert first - second == 6 * transforms.setup_bytes(codec)
  vector = jax.ShapeDtypeStruct((size,), np.float32)
  assert second == 6 * wire.nbytes(base.Dense(vector))
  assert lines[0]["upload_bytes"] <= 6 * size
  # At so many bits all of a client arrives.
  assert lines[0]["innovation_cosine"] > 0.9


@pytest.fixture(scope="module")
def tuned(task, codec_folder):
  """Rounds with a codec, whose fits are counted."""
  codec, _ = files.load(codec_folder, task.trainable)
  algorithm = cg_fed_llm.cg_fed_llm(
    task.loss_fn,
    SGD,
    optax.sgd(1.0),
    coding=experiments.coding(codec, is_refitted=True),
    population=6,
    volunteers=np.ones(6, bool),
    placement=task.placement,
  )
  fits = []

  def refit(vectors, codec):
    fits.append(len(vectors))
    return experiments.refit(vectors, codec, fitting.Settings(steps=2))

  plain = finetuning.fine_tuning(task, algorithm, SCHEDULE)
  return experiments.refitted(plain, refit, every=2), fits


def test_a_codec_is_fitted_anew_every_few_rounds(tuned):
  made, fits = tuned
  state, codecs, lines = made.init(), [], []
  for number in range(3):
    state, line = made.round(state, number)
    codecs.append(jax.device_get(state.codec.encoder))
    lines.append(line)
  same = lambda x, y: jax.tree.all(jax.tree.map(np.array_equal, x, y))
  assert same(codecs[0], codecs[1]) and not same(codecs[1], codecs[2])
  assert len(fits) == 1 and 3 <= fits[0] <= 6
  assert int(state.version) == 2
  # Everyone of the third round fetches the new encoder.
  assert lines[2]["download_bytes"] == lines[0]["download_bytes"]
  assert {"update_cosine", "innovation_cosine"} <= lines[2].keys()


def test_nobody_fetches_a_codec_again_that_stayed_the_same(tuned):
  made, _ = tuned
  same = experiments.refitted(made, lambda vectors, old: old, every=1)
  state, version = made.init(), []
  for number in range(2):
    state, line = same.round(state, number)
    version.append(int(state.version))
  assert version == [1, 1]


def test_refitted_rounds_go_on_bit_for_bit(tuned, tmp_path):
  # What the codec is fitted to is part of the state.
  made, _ = tuned
  killed = functools.partial(_killed, made)
  with pytest.raises(RuntimeError, match="killed"):
    runner.run(dataclasses.replace(made, round=killed), tmp_path / "a")
  for folder in ("a", "b"):
    runner.run(made, tmp_path / folder)
  adapters = [
    (tmp_path / x / "adapter" / "adapter_model.safetensors").read_bytes()
    for x in ("a", "b")
  ]
  assert adapters[0] == adapters[1]


def _killed(made, state, number):
  if number == 3:
    raise RuntimeError("killed")
  return made.round(state, number)


def test_a_codec_is_refitted_at_least_every_round(made):
  with pytest.raises(ValueError, match="got every=0"):
    experiments.refitted(made, lambda vectors, codec: codec, every=0)


def test_a_codec_stays_where_there_is_nothing_to_fit_it_to():
  codec = object()
  settings = fitting.Settings(steps=1)
  assert experiments.refit(np.zeros((2, 4)), codec, settings) is codec


@pytest.mark.parametrize("normalise", ["none", "one", "columns"])
def test_a_refit_normalises_like_the_last_fit(task, store, normalise):
  codec, _ = fitting.fit(
    store.snapshots,
    layouts.columns(task.trainable, width=16),
    row_network.network(16, latents=8, bits=None),
    fitting.Settings(steps=2, normalise=normalise, held_out=0.3),
  )
  again = experiments.refit(
    8 * store.snapshots, codec, fitting.Settings(steps=1)
  )
  moved = np.median(again.scale / codec.scale)
  expected = 1 if normalise == "none" else 8
  np.testing.assert_allclose(moved, expected, rtol=0.2)
  assert again.scale.shape == codec.scale.shape


def test_known_is_in_the_order_of_clients(tuned):
  made, _ = tuned
  state, _ = made.round(made.init(), 0)
  vectors = codec_state.known(state)
  assert vectors.shape[0] == int((np.asarray(state.held) > 0).sum()) == 3
