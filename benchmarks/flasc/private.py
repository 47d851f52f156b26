"""Client-level differential privacy: dense LoRA, FLASC and FFA-LoRA.

  FEDJAX_LLM_DATA=folder python -m benchmarks.flasc.private TASK [--seeds 3]
  fedjax-llm compare benchmarks/results/flasc/TASK_private.jsonl

Poisson cohorts, adaptive clipping at the median, PLD accountant, delta below
one in the population. A larger population is simulated: the noise is that of a
hundred times as many clients, divided among them.
"""

from benchmarks import problems, study
from benchmarks.flasc import methods, rates

EPSILONS = (2.0, 8.0)
METHODS = {"dense": 1.0, "FLASC": 1 / 4, "FFA-LoRA": 1.0}
FACTOR = 100


def cells(given) -> list[study.Cell]:
  """Every method at every epsilon, and dense LoRA without any, seed by seed."""
  settings = [("dense", 1.0, None)]
  settings += [
    (f"{method}, private", density, epsilon)
    for epsilon in EPSILONS
    for method, density in METHODS.items()
  ]
  return [
    study.Cell(
      given.task,
      method,
      density,
      4,
      seed,
      *rates.of(given.task, method.removesuffix(", private"), given.out),
      rounds=given.rounds or problems.PROBLEMS[given.task].rounds,
      knobs=_knobs(epsilon),
    )
    for seed in range(given.seeds)
    for method, density, epsilon in settings
  ]


def _knobs(epsilon):
  if epsilon is None:
    return ()
  return (
    ("epsilon", epsilon),
    ("delta", 1e-5),
    ("cohort_factor", FACTOR),
    ("clients_per_round", problems.CLIENTS_PER_ROUND),
  )


if __name__ == "__main__":
  study.program(__doc__, "flasc", "_private", [cells], methods.experiment)
