"""The accelerator benchmark measures what it says, and stops in time."""

import json
import sys

import jax
import pytest

from benchmarks.flasc import accelerator
from fedjax_llm.models import families, lora


@pytest.fixture
def rows(tmp_path, monkeypatch):
  """Runs the command with one toy model and two channels."""

  def run(*options):
    for name, kept in (("TOYS", "toy Llama"), ("CHANNELS", "FLASC, 1/16")):
      table = getattr(accelerator, name)
      names = ("dense", kept) if name == "CHANNELS" else (kept,)
      monkeypatch.setattr(accelerator, name, {x: table[x] for x in names})
    arguments = ["accelerator", "--toy", "--out", str(tmp_path), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    accelerator.main()
    (path,) = tmp_path.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]

  return run


def test_rows_have_speed_and_real_bytes(rows):
  device, placement, dense, sparse, done = rows()
  assert device["peak_tflops"] > 0 and done == {"what": "done"}
  assert placement["tokens_per_second"] > 0
  # 4 clients; 7 layers of rank 16 in each of 2 blocks.
  widths = [(32, 32), (32, 16), (32, 16), (32, 32)]
  widths += [(32, 64), (32, 64), (64, 32)]
  entries = 2 * 16 * sum(map(sum, widths))
  assert dense["upload_bytes"] == pytest.approx(4 * 4 * entries, rel=1e-2)
  assert dense["relative"] == 1
  assert sparse["download_bytes"] < dense["download_bytes"] / 13


def test_nothing_begins_when_time_is_up(rows):
  found = rows("--seconds", "0")
  assert [x["what"] for x in found] == ["device", "placement", "done"]
  assert found[1]["skipped"] == "no time left"


def test_shapes_are_those_of_the_models_they_name():
  for name, millions, multiplied in (
    # Blocks, then embeddings.
    ("GPT-2 small", 124.4, 12 * 12 * 768**2 + 50257 * 768),
    (
      *("SmolLM2-135M", 134.5),
      30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536) + 49152 * 576,
    ),
  ):
    config = families.from_hugging_face(accelerator.SHAPES[name].fields)
    shapes = lora.abstract_variables(families.model(config))["params"]
    size = sum(x.size for x in jax.tree.leaves(shapes))
    assert size / 1e6 == pytest.approx(millions, abs=0.1)
    assert accelerator.multiplied(config, shapes) == multiplied
