import json
import pathlib

import numpy as np
import pytest

from fedjax_llm.codecs import recording
from fedjax_llm.federated import parameters

TREE = {"q": {"a": np.zeros((2, 3)), "b": np.zeros((3, 1))}}
VECTORS = np.random.default_rng(0).normal(0, 1e-3, (6, 9)).astype(np.float32)


def filled(folder):
  """Two rounds of two and three clients."""
  store = recording.Store.create(folder, TREE, representation="delta")
  store.append(0, clients=[4, 1], weights=[2, 3], vectors=VECTORS[:2])
  store.append(1, clients=[1, 0, 7], weights=[3, 1, 1], vectors=VECTORS[2:5])
  return store


def test_what_is_recorded_comes_back_bit_for_bit(tmp_path):
  filled(tmp_path)
  store = recording.Store(tmp_path)
  assert isinstance(store.snapshots, np.memmap)
  np.testing.assert_array_equal(store.snapshots, VECTORS[:5])
  assert store.rounds.tolist() == [0, 0, 1, 1, 1]
  assert store.clients.tolist() == [4, 1, 1, 0, 7]
  assert store.weights.tolist() == [2, 3, 3, 1, 1]
  assert store.about["representation"] == "delta"
  assert len(store) == 5


def test_a_store_goes_on_where_it_was(tmp_path):
  filled(tmp_path)
  store = recording.Store.create(tmp_path, TREE, representation="delta")
  store.append(2, clients=[2], weights=[1], vectors=VECTORS[5:])
  np.testing.assert_array_equal(store.snapshots, VECTORS)
  np.testing.assert_array_equal(recording.Store(tmp_path).snapshots, VECTORS)


def test_a_round_that_is_computed_again_takes_its_own_place(tmp_path):
  # A killed run goes on from its last checkpoint.
  store = filled(tmp_path)
  store.append(1, clients=[5], weights=[1], vectors=VECTORS[5:])
  again = recording.Store(tmp_path)
  assert again.clients.tolist() == [4, 1, 5]
  np.testing.assert_array_equal(again.snapshots, VECTORS[[0, 1, 5]])
  assert (tmp_path / "snapshots.bin").stat().st_size == 3 * 9 * 4


@pytest.mark.parametrize("kept", range(0, 9 * 4 * 3, 13))
def test_a_process_killed_over_the_vectors_leaves_whole_ones(tmp_path, kept):
  store = filled(tmp_path)
  # The lines of the second round were not written yet, its vectors in part.
  lines = (tmp_path / "index.jsonl").read_text().splitlines(keepends=True)
  (tmp_path / "index.jsonl").write_text("".join(lines[:2]))
  with (tmp_path / "snapshots.bin").open("r+b") as file:
    file.truncate(2 * 9 * 4 + kept)
  store = recording.Store(tmp_path)
  np.testing.assert_array_equal(store.snapshots, VECTORS[:2])
  store.append(1, clients=[1, 0, 7], weights=[3, 1, 1], vectors=VECTORS[2:5])
  np.testing.assert_array_equal(
    recording.Store(tmp_path).snapshots, VECTORS[:5]
  )


def test_a_process_killed_over_the_lines_leaves_whole_ones(tmp_path):
  filled(tmp_path)
  path = tmp_path / "index.jsonl"
  path.write_text(path.read_text()[:-9])
  store = recording.Store(tmp_path)
  np.testing.assert_array_equal(store.snapshots, VECTORS[:4])
  store.append(1, clients=[5], weights=[1], vectors=VECTORS[5:])
  again = recording.Store(tmp_path)
  np.testing.assert_array_equal(again.snapshots, VECTORS[[0, 1, 5]])


def test_vectors_that_a_disk_lost_are_no_snapshots(tmp_path):
  filled(tmp_path)
  with (tmp_path / "snapshots.bin").open("r+b") as file:
    file.truncate(3 * 9 * 4 + 5)
  assert recording.Store(tmp_path).snapshots.shape == (3, 9)


def test_the_signature_tells_trees_apart(tmp_path):
  turned = {"q": {"b": np.zeros((3, 1)), "a": np.zeros((2, 3))}}
  assert parameters.signature(turned) == parameters.signature(TREE)
  wider = {"q": {"a": np.zeros((3, 2)), "b": np.zeros((3, 1))}}
  assert parameters.signature(wider) != parameters.signature(TREE)
  filled(tmp_path)
  with pytest.raises(ValueError, match="Record into another folder"):
    recording.Store.create(tmp_path, wider, representation="delta")
  with pytest.raises(ValueError, match="'state'"):
    recording.Store.create(tmp_path, TREE, representation="state")
  about = json.loads((tmp_path / "store.json").read_text())
  assert about["signature"] == parameters.signature(TREE)


def test_what_is_no_snapshot_is_refused(tmp_path):
  store = recording.Store.create(tmp_path, TREE)
  with pytest.raises(ValueError, match="no update is recorded yet"):
    _ = store.snapshots
  with pytest.raises(ValueError, match=r"vectors \[1, 9\], got \(1, 8\)"):
    store.append(0, clients=[0], weights=[1], vectors=VECTORS[:1, :8])
  with pytest.raises(ValueError, match="round 0 is not finite"):
    store.append(0, clients=[0], weights=[1], vectors=VECTORS[:1] * np.nan)
  with pytest.raises(ValueError, match="found no store.json"):
    recording.Store(pathlib.Path(tmp_path) / "nothing")
