"""Utility against bytes: methods, densities, ranks and seeds on one task.

  FEDJAX_LLM_DATA=folder python benchmarks/flasc/utility.py TASK [--seeds 3]
  fedjax-llm compare benchmarks/results/flasc/TASK.jsonl

TASK is shakespeare, newsgroups or library; `rates.py TASK` comes first.
"""

import itertools

import problems
import rates
import study

DENSITIES = (1 / 4, 1 / 16, 1 / 64)
SPARSE = ("FLASC", "SparseAdapter", "Adapter-LTH", "Federated Select")


def cells(given) -> list[study.Cell]:
  """Seeds first, so that an unfinished study has all methods of some seeds."""
  settings = [(16, "dense", 1.0), *itertools.product([16], SPARSE, DENSITIES)]
  settings += [(4, "dense", 1.0)]
  settings += itertools.product([4], ["FLASC"], DENSITIES)
  return [
    study.Cell(
      given.task,
      method,
      density,
      rank,
      seed,
      *rates.of(given.task, method, given.out),
      rounds=given.rounds or problems.ROUNDS[given.task],
    )
    for seed in range(given.seeds)
    for rank, method, density in settings
  ]


if __name__ == "__main__":
  given = study.arguments(__doc__)
  study.run(
    cells(given), given.out / f"{given.task}.jsonl", processes=given.processes
  )
