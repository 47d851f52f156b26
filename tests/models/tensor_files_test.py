import contextlib

import numpy as np
import pytest

from fedjax_llm.models import layout, tensor_files

NAMES = layout.Layout(base="model", layers="layers", heads=("score",))
PATH = ("layers", "up", "kernel")


@pytest.fixture
def kernel():
  return np.random.default_rng(0).normal(size=(3, 70, 5)).astype(np.float32)


@pytest.fixture
def opened(kernel, tmp_path):
  """The kernels of three layers in as many files, open."""
  tensors = (
    (NAMES.tensor_name(PATH, layer), np.ascontiguousarray(kernel[layer].T))
    for layer in range(3)
  )
  shards = ({name: array} for name, array in tensors)
  tensor_files.write(tmp_path, shards)
  with contextlib.ExitStack() as stack:
    yield tensor_files.open_tensors(tmp_path, NAMES, stack)


# All of it, layers, and inputs that cross what is read at once.
PARTS = [
  (slice(None), slice(None), slice(None)),
  (slice(1, 3), slice(None), slice(None)),
  (slice(0, 1), slice(20, 70), slice(1, 4)),
]


@pytest.mark.parametrize("part", PARTS)
def test_any_part_of_a_parameter_is_read(opened, kernel, part):
  tensors = [opened[NAMES.tensor_name(PATH, layer)] for layer in range(3)]
  parameter = tensor_files.Parameter(
    tensors, NAMES, PATH, kernel.shape, np.float32
  )
  np.testing.assert_array_equal(parameter[part], kernel[part])


def test_shards_are_as_large_as_they_may_be(monkeypatch):
  monkeypatch.setattr(tensor_files, "_SHARD_BYTES", 20)
  tensors = [(name, np.zeros(2, np.float32)) for name in "abcde"]
  tensors.append(("large", np.zeros(9, np.float32)))
  shards = list(tensor_files.shards(tensors))
  assert [list(shard) for shard in shards] == [
    ["a", "b"],
    ["c", "d"],
    ["e"],
    ["large"],
  ]


def test_a_single_shard_has_no_index(tmp_path):
  tensor_files.write(tmp_path, [{"x": np.zeros(3)}])
  assert [x.name for x in tmp_path.iterdir()] == ["model.safetensors"]
