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

ROUNDS = {"shakespeare": 30, "library": 15, "dolly": 20}
# At half a bit an entry, a 64th of float32: by the first seed, and by all.
ONCE = (
  "Top-K",
  "PowerSGD",
  "trellis",
  "PCA",
  "paper's autoencoder",
  "our autoencoder",
)
ALWAYS = ("STC", "EDEN", "our transform code")
# At a bit, by the first seed.
AT_ONE = ("STC", "DRIVE", "EDEN", "our transform code")


def cells(given) -> list[study.Cell]:
  """Seeds first, so that an unfinished study has all codecs of some seeds."""
  rate = rates.of(given.task, given.out)

  def settings(seed):
    yield "dense", ()
    names = ALWAYS if seed else ALWAYS + ONCE
    for feedback, name in itertools.product((False, True), names):
      yield name, _knobs(0.5, feedback)
    for name in () if seed else AT_ONE:
      yield name, _knobs(1.0, False)

  return [
    study.Cell(
      given.task,
      method,
      1.0,
      16,
      seed,
      rate,
      1.0,
      rounds=given.rounds or ROUNDS[given.task],
      knobs=knobs,
    )
    for seed in range(given.seeds)
    for method, knobs in settings(seed)
  ]


def _knobs(bits: float, feedback: bool) -> tuple[tuple[str, Any], ...]:
  return (("bits", bits), ("error_feedback", feedback))


if __name__ == "__main__":
  given = study.arguments(__doc__, "cg_fedllm")
  path = given.out / f"{given.task}.jsonl"
  study.run(cells(given), path, methods.experiment, processes=given.processes)
