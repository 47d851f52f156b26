"""Fine-tuning through codecs: held-out loss against the bytes of uploads.

  FEDJAX_LLM_DATA=folder python -m benchmarks.cg_fedllm.utility TASK [--seeds 3]
  fedjax-llm compare benchmarks/results/cg_fedllm/TASK.jsonl

TASK is shakespeare, library or dolly; `rates TASK` and `distortion TASK` come
first. On D2, with and without error feedback.
"""

import itertools
from typing import Any

from benchmarks import problems, study
from benchmarks.cg_fedllm import methods, rates

# At half a bit an entry, a 64th of float32, by all seeds.
AT_HALF = (
  "Top-K",
  "STC",
  "PowerSGD",
  "EDEN",
  "PCA",
  "paper's autoencoder",
  "our autoencoder",
  "our transform code",
)
# By the first seed alone.
AT_MORE = {
  1.0: (
    "Top-K",
    "STC",
    "PowerSGD",
    "DRIVE",
    "EDEN",
    "our autoencoder",
    "our transform code",
  ),
  2.0: (
    "Top-K",
    "QSGD",
    "PowerSGD",
    "EDEN",
    "our autoencoder",
    "our transform code",
  ),
}


def cells(given) -> list[study.Cell]:
  """Seeds first, so that an unfinished study has all codecs of some seeds."""
  rate = rates.of(given.task, given.out)

  def settings(seed):
    yield "uncompressed", ()
    both = (False, True)
    for feedback, name in itertools.product(both, AT_HALF):
      yield name, _knobs(0.5, feedback)
    if seed == 0:
      for bits, names in AT_MORE.items():
        for name in names:
          yield name, _knobs(bits, False)

  return [
    study.Cell(
      given.task,
      method,
      1.0,
      16,
      seed,
      rate,
      1.0,
      rounds=given.rounds or problems.ROUNDS[given.task],
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
