"""Examples that are arrays, and who owns which rows."""

import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm.data import arrays

EXAMPLES = {"x": np.zeros((5, 2)), "y": np.zeros(5)}


def test_clients_own_consecutive_rows():
  made = arrays.population(EXAMPLES, [0, 2, 5])
  assert made.names == ("0", "1")
  assert np.diff(made.starts).tolist() == [2, 3]
  assert made.examples is EXAMPLES
  assert arrays.population(EXAMPLES, [0, 5], ["a"]).names == ("a",)


@pytest.mark.parametrize(
  "examples, starts, names, message",
  [
    ({"x": np.zeros(5), "y": np.zeros(4)}, [0, 5], None, "one number of rows"),
    ({"x": np.float32(1)}, [0, 1], None, "arrays .rows, ...."),
    ({}, [0, 1], None, "tree of arrays"),
    (
      [1.0] * 9,
      [0, 9],
      None,
      "got 9 leaves: .* A list is a tree",
    ),
    (EXAMPLES, [0, 2], None, "from 0 to 5, got .0 2."),
    (EXAMPLES, [2, 5], None, "from 0 to 5"),
    (EXAMPLES, [0, 2, 2, 5], None, "integers that increase"),
    (EXAMPLES, [0.0, 5.0], None, "integers"),
    (EXAMPLES, [5], None, "from 0 to 5"),
    (EXAMPLES, [0, 2, 5], ["a"], "each of 2 clients, got 1 names"),
  ],
)
def test_what_does_not_fit_is_refused(examples, starts, names, message):
  with pytest.raises(ValueError, match=message):
    arrays.population(examples, starts, names)


def test_a_tree_is_written_by_its_paths(tmp_path):
  tree = {"layer": {"w": np.ones((2, 3)), "b": np.zeros(3)}}
  arrays.save(tree, tmp_path / "new")
  saved = safetensors.numpy.load_file(
    tmp_path / "new" / "trainable.safetensors"
  )
  assert sorted(saved) == ["layer/b", "layer/w"]
  np.testing.assert_array_equal(saved["layer/w"], tree["layer"]["w"])
