"""The effect of skewed labels: 20 Newsgroups divided by Dirichlet shares.

  FEDJAX_LLM_DATA=folder python -m benchmarks.flasc.dirichlet [--seeds 3]
  fedjax-llm compare benchmarks/results/flasc/newsgroups_dirichlet.jsonl

The lower alpha, the fewer groups a client has posts of.
"""

from benchmarks import problems, study
from benchmarks.flasc import methods, rates

ALPHAS = (1.0, 0.01)
METHODS = {"dense": 1.0, "FLASC": 1 / 16}


def cells(given) -> list[study.Cell]:
  """Both methods at every alpha, seed by seed."""
  return [
    study.Cell(
      "newsgroups",
      method,
      density,
      16,
      seed,
      *rates.of("newsgroups", method, given.out),
      rounds=given.rounds or problems.PROBLEMS["newsgroups"].rounds,
      knobs=(("dirichlet_alpha", alpha),),
    )
    for seed in range(given.seeds)
    for alpha in ALPHAS
    for method, density in METHODS.items()
  ]


if __name__ == "__main__":
  given = study.arguments(__doc__, "flasc")
  path = given.out / "newsgroups_dirichlet.jsonl"
  study.run(cells(given), path, methods.experiment, processes=given.processes)
