"""Config files: found by name or path, their knobs read off a signature."""

import pytest

from fedjax_llm.cli import configs


def test_every_shipped_config_has_a_line_that_tells_what_it_is():
  lines = configs.summaries()
  names = [path.stem for path in sorted(configs.folder().glob("*.py"))]
  assert "quickstart" in names
  assert [line.split()[0] for line in lines] == names
  assert all(len(line.split()) > 3 for line in lines)


def test_a_config_that_is_not_there_is_refused_with_the_names_of_others():
  with pytest.raises(ValueError, match="one of cg_fedllm, .* got 'nothing'"):
    configs.load("nothing")


@pytest.mark.parametrize(
  "source, message",
  [
    ("rounds = 3", "has no function `experiment`"),
    ("def experiment(*, rate=1): pass", "'rate' has no type"),
  ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, source, message):
  path = tmp_path / "mine.py"
  path.write_text(source)
  with pytest.raises(ValueError, match=message):
    configs.options_of(configs.load(str(path)))


def test_a_config_of_ones_own_may_have_dataclasses(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "from __future__ import annotations\n"
    "import dataclasses\n"
    "@dataclasses.dataclass\n"
    "class Shape:\n"
    "  width: int = 3\n"
    "def experiment(*, width: int = Shape().width): pass"
  )
  options = configs.options_of(configs.load(str(path)))
  assert vars(options()) == {"width": 3, "out": None}


def test_a_knob_without_a_default_is_required(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("def experiment(*, model: str, rank: int = 2): pass")
  options = configs.options_of(configs.load(str(path)))
  assert vars(options(model="m")) == {"model": "m", "rank": 2, "out": None}
  with pytest.raises(TypeError, match="model"):
    options()
