"""Fine-tuning through codecs: held-out loss against the bytes of uploads.

  FEDJAX_LLM_DATA=folder python -m benchmarks.cg_fedllm.utility TASK [--seeds 3]
  fedjax-llm compare benchmarks/results/cg_fedllm/TASK.jsonl

TASK is shakespeare, library or dolly; `rates TASK` and `distortion TASK` come
first. On D2, with and without error feedback.
"""

import itertools
from typing import Any

from benchmarks import study
from benchmarks.cg_fedllm import methods, rates

ROUNDS = {"shakespeare": 30, "library": 15, "dolly": 15}
# At half a bit an entry, a 64th of float32, with the first seed alone.
OTHERS = (
  "Top-K",
  "PowerSGD",
  "PCA",
  "paper's autoencoder",
  "our autoencoder",
)
# At a bit, with the first seed alone.
AT_ONE = ("STC", "DRIVE", "EDEN", "trellis", "our transform code")


def cells(given) -> list[study.Cell]:
  """What all seeds run, then what the first one does besides."""
  always: list[tuple[str, Any]] = [("dense", ())]
  always += [(x, _knobs(0.5, y)) for x in rates.MAIN for y in (False, True)]
  once = [(name, _knobs(0.5, False)) for name in OTHERS]
  once += [(name, _knobs(1.0, False)) for name in AT_ONE]
  each = itertools.product(range(given.seeds), always)
  return [
    _cell(given, *setting, seed)
    for seed, setting in [*each, *((0, setting) for setting in once)]
  ]


def _cell(given, method, knobs, seed) -> study.Cell:
  feedback = dict(knobs).get("error_feedback")
  return study.Cell(
    given.task,
    method,
    1.0,
    16,
    seed,
    rates.of(given.task, given.out),
    1.0 if feedback else rates.of_server(given.task, method, given.out),
    rounds=given.rounds or ROUNDS[given.task],
    knobs=knobs,
  )


def _knobs(bits: float, feedback: bool) -> tuple[tuple[str, Any], ...]:
  return (("bits", bits), ("error_feedback", feedback))


if __name__ == "__main__":
  given = study.arguments(__doc__, "cg_fedllm")
  path = given.out / f"{given.task}.jsonl"
  study.run(cells(given), path, methods.experiment, processes=given.processes)
