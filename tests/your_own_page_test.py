"""The programs in docs/your_own.md run, each by itself."""

import ast
import json
import pathlib
import re

import pytest

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "your_own.md"
BLOCKS = re.findall(
  r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
)


def run(block, folder, monkeypatch):
  """Runs a block in an empty folder: its names."""
  monkeypatch.chdir(folder)
  # Dataclasses look their module up, so the block's has a name that is there.
  names = {"__name__": __name__}
  exec(compile(block, str(PAGE), "exec"), names)
  return names


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_run(block, tmp_path, monkeypatch):
  run(block, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["smoothed", "custom"])
def test_what_is_trained_is_learnt(name, tmp_path, monkeypatch):
  (block,) = (block for block in BLOCKS if f"runs/{name}" in block)
  run(block, tmp_path, monkeypatch)
  path = tmp_path / "runs" / name / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  first, last = lines[0]["loss"], lines[-1]["loss"]
  # The numbers' mean has a variance of 85.25 left, of 325.5 at zero.
  assert last < (86 if name == "smoothed" else 0.8 * first)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_nothing_private_is_needed(block):
  for node in ast.walk(ast.parse(block)):
    if isinstance(node, ast.Attribute):
      assert not node.attr.startswith("_") or node.attr == "_replace"
    if isinstance(node, ast.ImportFrom):
      assert node.module != "fedjax_llm"
