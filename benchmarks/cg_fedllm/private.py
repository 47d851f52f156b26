"""Fine-tuning with private messages: held-out loss against epsilon.

  FEDJAX_LLM_DATA=folder python -m benchmarks.cg_fedllm.private TASK --seeds 1
  fedjax-llm compare benchmarks/results/cg_fedllm/TASK_private.jsonl

TASK is shakespeare; run `rates TASK` first. It compares uncompressed uploads,
our transform code with noise before it, and PCA with noise after it, the codecs
at half a bit per entry. `noise` says what epsilon accounts for, and why no
other codec has noise after it. The server knows the size of the noise and takes
smaller steps, `Noise.server_rate`. PCA also adds the mean update on D1, which
needs no message. The runs without noise are in `utility`, except for the
uncompressed one. At the end the program prints the size of the noise that
arrives, also for noise before PCA.
"""

import tabulate

from benchmarks import study
from benchmarks.cg_fedllm import methods, rates, recordings

BITS = 0.5
EPSILONS = (0.25, 2.0, 8.0)
MECHANISMS = (
  ("dense", "before"),
  ("our transform code", "before"),
  ("PCA", "after"),
)
# Its noise is measured, but it is not run.
ALSO = ("PCA", "before")


def cells(given) -> list[study.Cell]:
  """Every mechanism at every epsilon, and one run without noise, per seed."""
  made = []
  for seed in range(given.seeds):
    plain = _cell(given, "dense", seed)
    recorded = recordings.of(plain)
    made.append(plain)
    for epsilon in EPSILONS:
      for method, place in MECHANISMS:
        cell = _cell(given, method, seed, _knobs(method, place, epsilon))
        rate = methods.noise_of(cell, recorded).server_rate
        made.append(_cell(given, method, seed, cell.knobs, rate))
  return made


def table(given) -> str:
  """Returns a Markdown table: the noise of each mechanism, first seed."""
  recorded = recordings.of(_cell(given, "dense", 0))
  rows = []
  for method, place in (*MECHANISMS, ALSO):
    for epsilon in EPSILONS:
      knobs = _knobs(method, place, epsilon)
      found = methods.noise_of(_cell(given, method, 0, knobs), recorded)
      rows.append(
        {
          "method": method,
          "noise": place,
          "epsilon": f"{epsilon:g}",
          "entries": f"{found.entries:,}",
          "clip norm": f"{found.clip_norm:.3g}",
          "deviation in clip norms": f"{found.multiplier:.3g}",
          "noise in a mean": f"{found.in_mean * found.clip_norm:.3g}",
        }
      )
  return tabulate.tabulate(
    rows, headers="keys", tablefmt="github", disable_numparse=True
  )


def _cell(given, method, seed, knobs=(), server_rate=1.0):
  return study.Cell(
    given.task,
    method,
    1.0,
    16,
    seed,
    rates.of(given.task, given.out),
    server_rate,
    rounds=given.rounds or rates.ROUNDS[given.task],
    knobs=knobs,
  )


def _knobs(method, place, epsilon):
  codec = () if method == "dense" else (("bits", BITS),)
  return (*codec, ("epsilon", epsilon), ("place", place))


if __name__ == "__main__":
  given = study.program(
    __doc__, "cg_fedllm", "_private", [cells], methods.experiment
  )
  print(table(given))
