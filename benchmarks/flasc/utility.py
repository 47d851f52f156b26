"""Utility against bytes: methods, densities, ranks and seeds on one task.

  FEDJAX_LLM_DATA=folder python -m benchmarks.flasc.utility TASK [--seeds 3]
  fedjax-llm compare benchmarks/results/flasc/TASK.jsonl

TASK is a key of `SETTINGS`, whose cells are in the order of what they tell;
`rates TASK` comes first.
"""

import itertools

from benchmarks import problems, study
from benchmarks.flasc import methods, rates

ALL, MOST = (1 / 4, 1 / 16, 1 / 64), (1 / 4, 1 / 16)
SPARSE = ("SparseAdapter", "Adapter-LTH", "Federated Select")
# By task: methods, with densities and ranks.
SETTINGS = {
  "shakespeare": [
    *itertools.product(["dense"], [1.0], [16, 4]),
    *itertools.product(["compact"], [1.0], [16, 4]),
    *itertools.product(["coarse", "compact, b alone"], [1.0], [16]),
    *itertools.product(["FLASC"], ALL, [16, 4]),
    *itertools.product(SPARSE, ALL, [16, 4]),
    *itertools.product(["FLASC, what moved"], MOST, [16, 4]),
    *itertools.product(["FLASC, factors apart"], MOST, [16]),
    ("FLASC, download alone", 1 / 4, 16),
    ("FLASC, upload alone", 1 / 16, 16),
    *itertools.product(["quantised"], [1 / 8, 1 / 16], [16]),
  ],
  "newsgroups": [
    *itertools.product(["dense", "coarse"], [1.0], [16]),
    *itertools.product(["FLASC"], MOST, [16]),
    *itertools.product(["FLASC, what moved", *SPARSE], [1 / 16], [16]),
    *itertools.product(["quantised"], [1 / 8], [16]),
    *itertools.product(["compact"], [1.0], [16]),
  ],
  "library": [
    *itertools.product(["dense", "compact"], [1.0], [16]),
    *itertools.product(["FLASC", "FLASC, what moved"], MOST, [16]),
    *itertools.product(["quantised"], [1 / 8], [16]),
  ],
  "minilm": [
    ("dense", 1.0, 16),
    *itertools.product(["FLASC"], MOST, [16]),
    ("Federated Select", 1 / 16, 16),
    ("FLASC, what moved", 1 / 16, 16),
    ("quantised", 1 / 8, 16),
    ("SparseAdapter", 1 / 16, 16),
    ("dense", 1.0, 4),
    ("FLASC", 1 / 64, 16),
    ("FLASC, 4 bits", 1 / 16, 16),
    ("FLASC, 4 bits, EDEN up", 1 / 16, 16),
    ("FLASC, 2 bits", 1 / 64, 16),
    ("FLASC, 4 bits, trellis up", 1 / 16, 16),
    ("Adapter-LTH", 1 / 16, 16),
    ("compact", 1.0, 16),
    ("FFA-LoRA", 1.0, 16),
    ("linear probe", 1.0, 16),
    ("Federated Select, no warm-up", 1 / 16, 16),
  ],
}

# With the first seed alone.
ONCE = {
  "shakespeare": [
    ("SparseAdapter, one Top-K", 1 / 4, 16),
    ("Federated Select, one Top-K", 1 / 4, 16),
  ],
  "library": [*itertools.product(SPARSE, [1 / 16], [16])],
}
# For so many times the rounds, with so many local steps. Fewer bytes a round
# leave some for more rounds, and more local steps want fewer rounds.
LENGTHS = {
  "shakespeare": [
    ("compact", 1.0, 16, 2, ()),
    ("dense", 1.0, 16, 3, ()),
    ("compact", 1.0, 16, 3, ()),
    ("FLASC", 1 / 16, 16, 3, ()),
    ("dense", 1.0, 16, 1 / 2, rates.MORE_STEPS),
    ("compact", 1.0, 16, 1 / 2, rates.MORE_STEPS),
    ("compact", 1.0, 16, 1, rates.MORE_STEPS),
    ("compact, b alone", 1.0, 16, 1, rates.MORE_STEPS),
  ]
}


def cells(given) -> list[study.Cell]:
  """Seeds first, so that an unfinished study has all methods of some seeds."""
  task = given.task
  rounds = given.rounds or problems.PROBLEMS[task].rounds

  def settings(seed):
    once = ONCE.get(task, []) if seed == 0 else []
    yield from ((*x, 1, ()) for x in [*SETTINGS[task], *once])
    yield from LENGTHS.get(task, [])

  return [
    study.Cell(
      task,
      method,
      density,
      rank,
      seed,
      *rates.of(task, method, given.out, knobs),
      rounds=round(rounds * times),
      knobs=knobs,
    )
    for seed in range(given.seeds)
    for method, density, rank, times, knobs in settings(seed)
    # The others may have no rates yet.
    if not given.methods or method in given.methods
  ]


if __name__ == "__main__":
  study.program(__doc__, "flasc", "", [cells], methods.experiment)
