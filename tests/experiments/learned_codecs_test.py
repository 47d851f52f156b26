"""Codecs of either kind, fitted to updates of a tree, written and read."""

import jax
import numpy as np
import pytest

from fedjax_llm.codecs import (
  autoencoder,
  layouts,
  recording,
  row_network,
  transforms,
)
from fedjax_llm.compression import base
from fedjax_llm.experiments import learned_codecs

WIDTH = 16
TREE = {"a": np.zeros((2, 24, 4)), "b": np.zeros((2, 4, 24))}
SIZE = 2 * 2 * 24 * 4


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  """Four rounds of three clients, some of whose entries move more."""
  store = recording.Store.create(
    tmp_path_factory.mktemp("recorded"), TREE, representation="delta"
  )
  generator = np.random.default_rng(0)
  spread = np.exp(generator.standard_normal(SIZE))
  for number in range(4):
    vectors = spread * generator.standard_normal((3, SIZE))
    store.append(number, clients=range(3), weights=[1] * 3, vectors=vectors)
  return store


@pytest.fixture(scope="module")
def codec_folder(store, tmp_path_factory):
  folder = tmp_path_factory.mktemp("autoencoder")
  learned_codecs.fit_autoencoder(
    store,
    folder,
    arrangement=layouts.columns(TREE, width=WIDTH),
    network=row_network.network(WIDTH, latents=8, bits=None),
    steps=20,
    evaluate_every=10,
  )
  return folder / "codec"


@pytest.fixture(scope="module")
def transform_folder(store, tmp_path_factory):
  folder = tmp_path_factory.mktemp("transform")
  # Of so few entries headers alone take four bits.
  learned_codecs.fit_transform(store, folder, trainable=TREE, bits=8.0)
  return folder / "codec"


def sent(coding, vector):
  """A vector as it arrives through what `coding` tells rounds."""
  code = coding["compressor_of"](coding["codec"])
  key = jax.random.key(0)
  return base.transmit(code, vector, code.init(vector), key).received


def test_a_codec_is_fitted_written_and_read(store, codec_folder):
  codec, about = learned_codecs.load(codec_folder, TREE)
  assert about["snapshots"] == len(store) == 12
  assert about["representation"] == "delta"
  assert "constant_mean" in (codec_folder / "report.txt").read_text()
  coding = learned_codecs.coding(codec, is_refitted=True)
  assert coding["codec"] is codec
  assert coding["setup_bytes"] == autoencoder.setup_bytes(codec)
  vector = store.snapshots[0]
  received = sent(coding, vector)
  assert received.shape == vector.shape
  assert np.sum((received - vector) ** 2) < np.sum(vector**2)


def test_a_stopped_fit_goes_on(store, codec_folder, tmp_path):
  settings = dict(
    arrangement=layouts.columns(TREE, width=WIDTH),
    network=row_network.network(WIDTH, latents=8, bits=None),
    evaluate_every=10,
  )
  for steps in (10, 20):
    learned_codecs.fit_autoencoder(store, tmp_path, steps=steps, **settings)
  whole, _ = learned_codecs.load(codec_folder, TREE)
  again, _ = learned_codecs.load(tmp_path / "codec", TREE)
  jax.tree.map(np.testing.assert_array_equal, again.encoder, whole.encoder)


def test_what_was_fitted_to_a_part_does_not_stand_in_the_way(store, tmp_path):
  # As of a run that was exported before its end.
  part = recording.Store.create(tmp_path / "recording", TREE)
  settings = dict(
    arrangement=layouts.columns(TREE, width=WIDTH),
    network=row_network.network(WIDTH, latents=8, bits=None),
    steps=4,
    evaluate_every=4,
  )
  for number in range(4):
    vectors = store.snapshots[3 * number : 3 * number + 3]
    part.append(number, clients=range(3), weights=[1] * 3, vectors=vectors)
    if number > 1:
      learned_codecs.fit_autoencoder(part, tmp_path, **settings)
      _, about = learned_codecs.load(tmp_path / "codec", TREE)
      assert about["snapshots"] == 3 * number + 3


def test_a_codec_that_transmits_nothing_says_so_when_it_is_read(
  store, codec_folder, transform_folder, tmp_path, capsys
):
  learned_codecs.load(transform_folder, TREE)
  assert "warning" not in capsys.readouterr().out
  # Where clients are alike, their mean is a better guess than a few bits.
  alike = recording.Store.create(tmp_path / "alike", TREE)
  generator = np.random.default_rng(1)
  shared = generator.standard_normal(SIZE)
  for number in range(4):
    vectors = shared + 1e-2 * generator.standard_normal((3, SIZE))
    alike.append(number, clients=range(3), weights=[1] * 3, vectors=vectors)
  learned_codecs.fit_transform(alike, tmp_path, trainable=TREE, bits=7.0)
  told = capsys.readouterr().out
  assert "no better than one that transmits nothing" in told
  learned_codecs.load(tmp_path / "codec", TREE)
  again = capsys.readouterr().out
  assert again.startswith(f"warning: {tmp_path / 'codec'}: this codec")
  assert "eden(0.5" in again


def test_a_codec_that_is_not_there_or_of_another_adapter_is_refused(
  codec_folder, transform_folder, tmp_path
):
  with pytest.raises(ValueError, match="fedjax-llm run tgap"):
    learned_codecs.load(tmp_path, TREE)
  for folder in (codec_folder, transform_folder):
    with pytest.raises(ValueError, match="an adapter of other shapes"):
      learned_codecs.load(folder, {"a": np.zeros((2, 2))})


def test_a_transform_is_fitted_to_rounds_that_do_not_judge_it(
  store, transform_folder
):
  found, about = learned_codecs.load(transform_folder, TREE)
  # Of four rounds one is a fifth, rounded up.
  expected = transforms.fit(store.snapshots[:9], TREE)
  same = jax.tree.map(np.array_equal, found, expected)
  assert jax.tree.all(same)
  assert about["snapshots"] == 12 and len(about["fingerprint"]) == 16
  report = (transform_folder / "report.txt").read_text()
  assert "constant_mean" in report and "bits an entry" in report


def test_a_fingerprint_is_of_the_codec(store, transform_folder, tmp_path):
  learned_codecs.fit_transform(store, tmp_path, trainable=TREE, bits=9.0)
  prints = [
    learned_codecs.load(folder, TREE)[1]["fingerprint"]
    for folder in (transform_folder, tmp_path / "codec")
  ]
  # The bits are of the report alone.
  assert prints[0] == prints[1]
  other = recording.Store.create(tmp_path / "other", TREE)
  for number in range(4):
    vectors = store.snapshots[::-1][:3] * [[1], [2], [3]]
    other.append(number, clients=range(3), weights=[1] * 3, vectors=vectors)
  learned_codecs.fit_transform(
    other, tmp_path / "another", trainable=TREE, bits=8.0
  )
  _, about = learned_codecs.load(tmp_path / "another" / "codec", TREE)
  assert about["fingerprint"] != prints[0]


def test_a_transform_is_coded_for_means_or_for_each_message(
  store, transform_folder
):
  codec, _ = learned_codecs.load(transform_folder, TREE)
  vector, told, errors = store.snapshots[0], {}, {}
  for unbiased in (True, False):
    coding = learned_codecs.coding(codec, bits=8.0, unbiased=unbiased)
    assert coding["setup_bytes"] == transforms.setup_bytes(codec)
    received = sent(coding, vector)
    told[unbiased] = float(received @ vector / (vector @ vector))
    error = np.sum((received - vector) ** 2) / (vector @ vector)
    errors[unbiased] = float(error)
  assert told[True] == pytest.approx(1, abs=0.01)
  # By which a code of the least error is shorter than what it is of.
  assert told[False] == pytest.approx(1 - errors[False], abs=0.01)
  assert errors[False] < errors[True]


def test_a_transform_is_not_fitted_anew(transform_folder):
  codec, _ = learned_codecs.load(transform_folder, TREE)
  with pytest.raises(ValueError, match="expected an autoencoder to fit anew"):
    learned_codecs.coding(codec, is_refitted=True)
