"""Rounds with a codec of either kind, and a codec that is refitted."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import optax
import pytest

from fedjax_llm.cli import configs
from fedjax_llm.codecs import fitting, layouts, row_network, transforms
from fedjax_llm.compression import base, wire
from fedjax_llm.data import records
from fedjax_llm.experiments import faf, finetuning, runner, tasks
from fedjax_llm.federated import codec_state
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
def task(toy_model):
  return tasks.language_model(
    records.streams(TOY.corpus(), held_out_rows=1),
    model=str(toy_model),
    adapter=lora.LoRA(rank=2, alpha=4.0),
    sequence_length=8,
  )


@pytest.fixture(scope="module")
def snapshots(task):
  """The updates of six clients in two rounds: [12, n]."""
  algorithm = tgap.federated_pretraining(
    task.loss_fn,
    SGD,
    optax.sgd(1.0),
    population=6,
    placement=task.placement,
  )
  schedule = dataclasses.replace(SCHEDULE, clients_per_round=6)
  seen = []
  made = finetuning.fine_tuning(
    task,
    algorithm,
    schedule,
    observe=lambda number, cohort, metrics: seen.append(metrics["snapshots"]),
  )
  state = made.init()
  for number in range(2):
    state, _ = made.round(state, number)
  return np.concatenate(seen)


@pytest.fixture(scope="module")
def transform(task, snapshots):
  return transforms.fit(snapshots, task.trainable)


def fitted(task, snapshots, settings):
  """An autoencoder of rows."""
  layout = layouts.columns(task.trainable, width=16)
  network = row_network.network(16, latents=8, bits=None)
  codec, _ = fitting.fit(snapshots, layout, network, settings)
  return codec


def sent(coding, vector):
  """A vector as it arrives."""
  code = coding.compressor_of(coding.codec)
  key = jax.random.key(0)
  return base.transmit(code, vector, code.init(vector), key).received


def test_a_transform_is_coded_for_means_or_for_each_message(
  transform, snapshots
):
  vector, told, errors = snapshots[0], {}, {}
  for unbiased in (True, False):
    coding = faf.coding(transform, bits=8.0, unbiased=unbiased)
    assert coding.setup_bytes == transforms.setup_bytes(transform)
    received = sent(coding, vector)
    told[unbiased] = float(received @ vector / (vector @ vector))
    error = np.sum((received - vector) ** 2) / (vector @ vector)
    errors[unbiased] = float(error)
  assert told[True] == pytest.approx(1, abs=0.01)
  # A code of least error is shorter than the vector by its error.
  assert told[False] == pytest.approx(1 - errors[False], abs=0.01)
  assert errors[False] < errors[True]


def test_a_transform_is_not_fitted_anew(transform):
  with pytest.raises(ValueError, match="expected an autoencoder to refit"):
    faf.coding(transform, is_refitted=True)


def test_clients_fetch_a_transform_once(task, transform):
  coding = faf.coding(transform, bits=8.0)
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
  assert first - second == 6 * transforms.setup_bytes(transform)
  vector = jax.ShapeDtypeStruct((size,), np.float32)
  assert second == 6 * wire.nbytes(base.Dense(vector))
  assert lines[0]["upload_bytes"] <= 6 * size
  # At so many bits all of a client arrives.
  assert lines[0]["innovation_cosine"] > 0.9


@pytest.fixture(scope="module")
def tuned(task, snapshots):
  """Rounds with an autoencoder, whose fits are counted."""
  codec = fitted(task, snapshots, fitting.Settings(steps=2, held_out=0.3))
  algorithm = cg_fed_llm.cg_fed_llm(
    task.loss_fn,
    SGD,
    optax.sgd(1.0),
    coding=faf.coding(codec, is_refitted=True),
    population=6,
    volunteers=np.ones(6, bool),
    placement=task.placement,
  )
  fits = []

  def refit(vectors, codec):
    fits.append(len(vectors))
    return faf.refit(vectors, codec, fitting.Settings(steps=2))

  plain = finetuning.fine_tuning(task, algorithm, SCHEDULE)
  return faf.refitted(plain, refit, every=2), fits


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
  same = faf.refitted(made, lambda vectors, old: old, every=1)
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


def test_a_codec_is_refitted_at_least_every_round(tuned):
  made, _ = tuned
  with pytest.raises(ValueError, match="got every=0"):
    faf.refitted(made, lambda vectors, codec: codec, every=0)


def test_a_codec_stays_where_there_is_nothing_to_fit_it_to():
  codec = object()
  settings = fitting.Settings(steps=1)
  assert faf.refit(np.zeros((2, 4)), codec, settings) is codec


@pytest.mark.parametrize("normalise", ["none", "one", "columns"])
def test_a_refit_normalises_like_the_last_fit(task, snapshots, normalise):
  settings = fitting.Settings(steps=2, normalise=normalise, held_out=0.3)
  codec = fitted(task, snapshots, settings)
  again = faf.refit(8 * snapshots, codec, fitting.Settings(steps=1))
  moved = np.median(again.scale / codec.scale)
  expected = 1 if normalise == "none" else 8
  np.testing.assert_allclose(moved, expected, rtol=0.2)
  assert again.scale.shape == codec.scale.shape


def test_known_is_in_the_order_of_clients(tuned):
  made, _ = tuned
  state, _ = made.round(made.init(), 0)
  vectors = codec_state.known(state)
  assert vectors.shape[0] == int((np.asarray(state.held) > 0).sum()) == 3
