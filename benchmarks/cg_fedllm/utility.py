"""Fine-tuning through codecs: held-out loss against the bytes of uploads.

  FEDJAX_LLM_DATA=folder python -m benchmarks.cg_fedllm.utility TASK [--seeds 3]
  fedjax-llm compare benchmarks/results/cg_fedllm/TASK.jsonl

TASK is shakespeare, library or dolly; run `rates TASK` first. Clients train on
D2, with and without error feedback.
"""

import itertools

from benchmarks import study
from benchmarks.cg_fedllm import methods, rates

# At half a bit per entry, 1/64 of float32, with the first seed only.
OTHERS = (*rates.OTHERS, "paper's autoencoder")
# With more bits what arrives is nearly what was sent, so these have the server
# rate of uncompressed rounds. With the first seed only, except our unbiased
# transform code at one bit.
MORE = {
  (1.0, False): (
    *("STC", "DRIVE", "EDEN", "trellis", "our transform code, unbiased"),
    *("Top-K", "PowerSGD", "our autoencoder"),
  ),
  (1.0, True): ("STC", "DRIVE", "EDEN", "trellis", "our transform code"),
  (2.0, False): (
    *("QSGD", "STC", "EDEN", "trellis"),
    "our transform code, unbiased",
  ),
}


def cells(given) -> list[study.Cell]:
  """The cells of all seeds, then those of the first seed only."""
  half = rates.knobs(0.5)
  fed = rates.knobs(0.5, feedback=True)
  tuned = lambda name, knobs: rates.of_server(
    given.task, name, knobs, given.out
  )
  plain = rates.SERVERS[0]
  always = [("dense", (), plain), ("dense", (), tuned("dense", ()))]
  always += [(name, half, tuned(name, half)) for name in rates.MAIN]
  # As CG-FedLLM averages.
  always += [(rates.MAIN[-1], half, plain)]
  always += [(name, fed, tuned(name, fed)) for name in rates.WITH_FEEDBACK]
  whole = tuned("dense", ())
  always += [(rates.MAIN[-1], rates.knobs(1.0), whole)]
  once = [(name, half, tuned(name, half)) for name in OTHERS]
  once += [(name, fed, plain) for name in OTHERS]
  for setting, names in MORE.items():
    once += [(name, rates.knobs(*setting), whole) for name in names]
  each = itertools.product(range(given.seeds), always)
  listed = [
    _cell(given, *setting, seed)
    for seed, setting in [*each, *((0, setting) for setting in once)]
  ]
  return list(dict.fromkeys(listed))


def _cell(given, method, knobs, server, seed) -> study.Cell:
  rate, decay = server
  return study.Cell(
    given.task,
    method,
    1.0,
    16,
    seed,
    rates.of(given.task, given.out),
    rate,
    rounds=given.rounds or rates.ROUNDS[given.task],
    knobs=(*knobs, *decay),
  )


if __name__ == "__main__":
  study.program(__doc__, "cg_fedllm", "", [cells], methods.experiment)
