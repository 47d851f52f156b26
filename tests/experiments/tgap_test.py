"""Recording, fitting, loading and fitting anew, at toy size."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from fedjax_llm.cli import main
from fedjax_llm.codecs import (
  fitting,
  layouts,
  recording,
  row_network,
  transforms,
)
from fedjax_llm.compression import base, wire
from fedjax_llm.data import records
from fedjax_llm.experiments import finetuning, learned_codecs, runner, tasks
from fedjax_llm.experiments import tgap as learned_compression
from fedjax_llm.federated import codec_rounds, network
from fedjax_llm.federated.algorithms import cg_fed_llm, tgap
from fedjax_llm.models import lora

TOY = main.load_config(
  str(pathlib.Path(__file__).parent.parent / "toy_config.py")
)
SGD = optax.sgd(0.1, momentum=0.9)
SCHEDULE = dict(
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
  return learned_compression.divided(whole, 0.3, seed=0)


@pytest.fixture(scope="module")
def task(halves):
  return halves[0]


def test_tasks_are_divided_with_their_rows_and_say_so(halves):
  # Law 11: numbers are counted on, so no row is like another.
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
  return learned_compression.recorded(
    task, algorithm, finish=finish, **SCHEDULE | knobs
  )


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
  assert store.about["layout"] == recording.layout(task.trainable)


def test_a_killed_recording_goes_on_bit_for_bit(made, store, tmp_path):
  # Law 15. The third round is recorded, then lost with its state.
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


@pytest.fixture(scope="module")
def codec_folder(task, store, folder):
  learned_codecs.fit_autoencoder(
    store,
    folder,
    arrangement=layouts.columns(task.trainable, width=16),
    network=row_network.network(16, latents=8, bits=None),
    steps=20,
    evaluate_every=10,
  )
  return folder / "codec"


@pytest.fixture(scope="module")
def transform_folder(task, store, tmp_path_factory):
  folder = tmp_path_factory.mktemp("transform")
  # Of so few entries headers alone take six bits.
  learned_codecs.fit_transform(
    store, folder, trainable=task.trainable, bits=8.0
  )
  return folder / "codec"


def test_clients_fetch_a_transform_once(task, transform_folder):
  codec, _ = learned_codecs.load(transform_folder, task.trainable)
  coding = learned_codecs.coding(codec, bits=8.0)
  algorithm = cg_fed_llm.cg_fed_llm(
    task.loss_fn,
    SGD,
    optax.sgd(1.0),
    population=6,
    placement=task.placement,
    **coding,
  )
  made = finetuning.federated(
    task, algorithm, **{**SCHEDULE, "clients_per_round": 6}
  )
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
  codec, _ = learned_codecs.load(codec_folder, task.trainable)
  algorithm = cg_fed_llm.cg_fed_llm(
    task.loss_fn,
    SGD,
    optax.sgd(1.0),
    **learned_codecs.coding(codec, is_refitted=True),
    population=6,
    volunteers=np.ones(6, bool),
    placement=task.placement,
  )
  fits = []

  def refit(vectors, codec):
    fits.append(len(vectors))
    return learned_compression.refit(vectors, codec, steps=2, evaluate_every=2)

  plain = finetuning.federated(task, algorithm, **SCHEDULE)
  return learned_compression.refitted(plain, refit, every=2), fits


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
  same = learned_compression.refitted(made, lambda vectors, old: old, every=1)
  state, version = made.init(), []
  for number in range(2):
    state, line = same.round(state, number)
    version.append(int(state.version))
  assert version == [1, 1]


def test_refitted_rounds_go_on_bit_for_bit(tuned, tmp_path):
  # Law 15: what the codec is fitted to is part of the state.
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
    learned_compression.refitted(made, lambda vectors, codec: codec, every=0)


def test_a_codec_stays_where_there_is_nothing_to_fit_it_to():
  codec = object()
  assert learned_compression.refit(np.zeros((2, 4)), codec, steps=1) is codec


@pytest.mark.parametrize("normalise", ["none", "one", "columns"])
def test_a_refit_normalises_like_the_last_fit(task, store, normalise):
  codec, _ = fitting.fit(
    store.snapshots,
    layouts.columns(task.trainable, width=16),
    row_network.network(16, latents=8, bits=None),
    normalise=normalise,
    steps=2,
    held_out=0.3,
  )
  again = learned_compression.refit(8 * store.snapshots, codec, steps=1)
  moved = np.median(again.scale / codec.scale)
  expected = 1 if normalise == "none" else 8
  np.testing.assert_allclose(moved, expected, rtol=0.2)
  assert again.scale.shape == codec.scale.shape


def test_known_is_in_the_order_of_clients(tuned):
  made, _ = tuned
  state, _ = made.round(made.init(), 0)
  vectors = codec_rounds.known(state)
  assert vectors.shape[0] == int((np.asarray(state.held) > 0).sum()) == 3
