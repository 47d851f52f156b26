"""Heterogeneous clients: three tiers, of ranks 1, 4 and 16 or as dense as that.

  FEDJAX_LLM_DATA=folder python -m benchmarks.flasc.tiers TASK [--seeds 3]
  fedjax-llm compare benchmarks/results/flasc/TASK_tiers.jsonl

A third of the clients can hold or send a sixteenth, a third a quarter, a third
everything. Their links (`network.ASYMMETRIC`) give simulated seconds. HetLoRA
and FlexLoRA replace the server's factors and have no server rate.
"""

from benchmarks import problems, study
from benchmarks.flasc import methods, rates

METHODS = (
  "dense",
  "FLASC tiers",
  "zero-padded ranks",
  "Federated Select, ranks",
  "HetLoRA",
  "FlexLoRA",
)


def cells(given) -> list[study.Cell]:
  """Every method, seed by seed."""
  return [
    study.Cell(
      given.task,
      method,
      1.0,
      16,
      seed,
      *rates.of(given.task, method, given.out),
      rounds=given.rounds or problems.PROBLEMS[given.task].rounds,
      knobs=(("network", "three tiers"),),
    )
    for seed in range(given.seeds)
    for method in METHODS
  ]


if __name__ == "__main__":
  study.program(__doc__, "flasc", "_tiers", [cells], methods.experiment)
