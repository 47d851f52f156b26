"""Every notebook runs from top to bottom in a fresh kernel, at toy size."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "colab"
TOY = 'rounds, clients_per_round, out = 1, 2, "runs"'
NOTEBOOKS = pytest.mark.parametrize(
  "path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem
)


@NOTEBOOKS
def test_notebook_runs(path, tmp_path, monkeypatch):
  notebook = nbformat.read(path, as_version=4)
  (knobs,) = [x for x in notebook.cells if x.source.startswith("# Knobs.")]
  knobs.source = TOY
  # The kernel finds the command of this environment, as on Colab.
  here = os.path.dirname(sys.executable)
  monkeypatch.setenv("PATH", os.pathsep.join((here, os.environ["PATH"])))
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
  assert "Device(" in text
  assert any("image/png" in output.get("data", {}) for output in outputs)


@NOTEBOOKS
def test_notebook_is_committed_without_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.fixture
def cells():
  """The first two code cells: they install, and look for an accelerator."""
  notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
  return [x.source for x in notebook.cells if x.cell_type == "code"][:2]


@pytest.fixture
def commands(monkeypatch, tmp_path):
  """The commands that cells run, where fedjax_llm is not installed."""
  seen = []
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(
    subprocess, "run", lambda command, **_: seen.append(command)
  )
  return seen


def test_an_address_nobody_has_edited_is_refused(cells, commands):
  with pytest.raises(ValueError, match="Edit REPOSITORY"):
    exec(cells[0], {})
  assert not commands


def test_the_first_cell_installs_from_the_repository(cells, commands):
  address = "git+https://example.org/somebody/fedjax_llm"
  exec(cells[0].replace("git+https://HOST/OWNER/fedjax_llm", address), {})
  assert commands == [[sys.executable, "-m", "pip", "install", "-q", address]]


def test_a_wheel_that_is_there_goes_first(cells, commands, tmp_path):
  (tmp_path / "fedjax_llm-1.0-py3-none-any.whl").touch()
  exec(cells[0], {})
  assert commands[0][-1] == "fedjax_llm-1.0-py3-none-any.whl"


@pytest.mark.parametrize(
  ("out", "is_told"),
  [
    ("gpu [CudaDevice(id=0)]", False),
    ("tpu [TpuDevice(id=0)]", False),
    ("cpu [CpuDevice(id=0)]", True),
    ("", True),
  ],
)
def test_who_has_no_accelerator_is_told(
  cells, monkeypatch, capsys, out, is_told
):
  done = subprocess.CompletedProcess([], 0, out, "what went wrong")
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
  exec(cells[1], {"subprocess": subprocess, "sys": sys})
  told = capsys.readouterr().out
  assert ("Change runtime type" in told) == is_told
  assert out in told and "what went wrong" in told
