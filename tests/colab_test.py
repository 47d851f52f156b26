"""Every notebook runs from top to bottom in a fresh kernel, at toy size."""

import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "colab"
TOY = 'rounds, clients_per_round, out = 1, 2, "runs"'


@pytest.mark.parametrize(
  "path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebook_runs(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  (knobs,) = [x for x in notebook.cells if x.source.startswith("# Knobs.")]
  knobs.source = TOY
  nbclient.NotebookClient(
    notebook,
    timeout=240,
    kernel_name="python3",
    resources={"metadata": {"path": str(tmp_path)}},
  ).execute()
  outputs = [
    output for cell in notebook.cells for output in cell.get("outputs", [])
  ]
  text = "".join(output.get("text", "") for output in outputs)
  assert "held-out loss" in text
  assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize(
  "path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebook_is_committed_without_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)
