"""docs/models.md says what the tests and the committed results say."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
import tabulate

from fedjax_llm.models import adapters, families

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
TEXT = PAGE.read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())
CONTRACT = "tests/models/families_test.py"
WIDTHS = {
  "vocab_size": 96,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}


def rows():
  """The cells of the table of families, by the heads of their columns."""
  table = re.search(r"^\| family .*?\n\n", TEXT, re.MULTILINE | re.DOTALL)
  assert table
  head, _, *lines = (
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in table[0].strip().splitlines()
  )
  return [dict(zip(head, line, strict=True)) for line in lines]


def quoted(start, end):
  """The names in backticks of the passage between two others."""
  (passage,) = re.findall(f"{re.escape(start)}(.*?){re.escape(end)}", PROSE)
  return re.findall(r"`([^` ]+)`", passage)


def test_cells_are_marked_where_a_test_is_collected():
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-n0", "-q", "--collect-only", CONTRACT],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  collected = re.findall(rf"^{CONTRACT}::.*", done.stdout, re.MULTILINE)
  marked = [
    f"{CONTRACT}::test_{column}[{row['model_type']}]"
    for row in rows()
    for column, cell in row.items()
    if cell == "✓"
  ]
  assert sorted(marked) == sorted(collected)


def test_every_family_has_a_row_and_fields():
  kinds = [row["model_type"] for row in rows()]
  assert kinds == list(families._FAMILIES)
  fields = re.findall(r"^\| (\w+) \| [^|]*\|$", TEXT, re.MULTILINE)
  assert fields == ["model_type", *kinds]


@pytest.mark.parametrize(
  "name, columns",
  [
    (
      "quantized_base",
      "base, activations, bits a layer weight, logit RMS error, KL nats, loss,"
      " gradient cosine",
    ),
    (
      "load_checkpoint",
      "format, placement, seconds, parameters MiB, peak MiB, peak / parameters",
    ),
  ],
)
def test_tables_are_those_of_the_committed_results(name, columns):
  path = ROOT / "benchmarks" / "results" / f"{name}.json"
  result, columns = json.loads(path.read_text()), columns.split(", ")
  lines = [
    {column: row[column] for column in columns} for row in result["rows"]
  ]
  table = tabulate.tabulate(lines, headers="keys", tablefmt="github")
  assert table in TEXT
  assert (result.get("checkpoint") or result["adapter"]) in PROSE
  assert f"`benchmarks/{name}.py`, {result['date']}" in PROSE


@pytest.mark.parametrize("kind", families._FAMILIES)
def test_fields_that_are_said_to_be_refused_are(kind):
  fields = quoted("switched on, such as", "Rotary positions")
  assert len(fields) == 9
  for field in [*fields, "position_embedding_type"]:
    given = {"model_type": kind, **WIDTHS, field: 0.5}
    with pytest.raises(ValueError, match=field):
      families.from_hugging_face(given)


def test_rotary_positions_that_are_said_to_be_refused_are():
  kinds = quoted("Rotary positions of the kinds", "are refused")
  assert len(kinds) == 3
  for rope in kinds:
    scaling = {"rope_type": rope, "factor": 2.0}
    given = {"model_type": "llama", **WIDTHS, "rope_scaling": scaling}
    with pytest.raises(ValueError, match=f"got '{rope}'"):
      families.from_hugging_face(given)


def test_models_that_are_said_to_be_missing_are_refused():
  kinds = [
    *quoted("- **Images and sound.**", "The text"),
    *quoted("- **Mixtures of experts**", "- **Long"),
    *quoted("Of encoders:", "refused"),
  ]
  assert len(kinds) > 10
  for kind in kinds:
    with pytest.raises(ValueError, match=f"got '{kind}'"):
      families.from_hugging_face({"model_type": kind, **WIDTHS})


def test_features_of_peft_that_are_said_to_be_refused_are(tmp_path):
  fields = quoted("on import, by name:", "PEFT methods")
  assert "init_lora_weights" in fields and len(fields) > 10
  (tmp_path / "adapter_model.safetensors").touch()
  for field in fields:
    given = {"peft_type": "LORA", field: "something"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=f"uses .*{field}"):
      adapters.load(tmp_path, None)


def test_linked_and_named_files_exist():
  for path in re.findall(r"`((?:benchmarks|tests)/[^`:]+)`", TEXT):
    assert (ROOT / path).is_file(), path
