"""The time of a round by placement, and the share of it that compression takes.

  python benchmarks/round_placement.py

The same FLASC round of a small Llama under every placement of its clients, and
under three channels. Candidates take turns, and each repetition compares them
with its own reference, so that what else the machine does cancels out.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from fedjax_llm.compression import base, sparse
from fedjax_llm.data import batches
from fedjax_llm.federated import channels, clients
from fedjax_llm.federated.algorithms import fed_avg, flasc
from fedjax_llm.models import decoder, language, lora, pretrained

ROOT = pathlib.Path(__file__).parent.parent
# XLA:CPU allocates its buffers anew in every step; huge pages make that cheap.
TUNABLES = "glibc.malloc.hugetlb=1"
CLIENTS, STEPS, BATCH, TIME = 10, 4, 6, 96
RANK, SEED = 8, 0
TOKENS = CLIENTS * STEPS * BATCH * TIME
# (devices, clients_per_step); the first is the reference of the others.
PLACEMENTS = ((1, 1), (1, 2), (1, 5), (1, 10), (2, 1), (2, 5))
# Densities both ways; None sends everything through `identity`.
CHANNELS = (None, 1 / 4, 1 / 16)


def problem(folder: pathlib.Path):
  """A model with factors everywhere, and rows of random tokens."""
  config, frozen = pretrained.load(folder)
  model = decoder.Decoder(config, lora.LoRA(RANK, targets=decoder.LINEAR))
  factors = lora.init(model, jax.random.key(SEED))
  rng = np.random.default_rng(SEED)
  rows = CLIENTS * STEPS * BATCH
  tokens = rng.integers(config.vocab_size, size=(rows, TIME + 1))
  examples = batches.Examples(
    tokens.astype(np.int32), np.ones((rows, TIME), bool)
  )
  indices = np.arange(rows, dtype=np.int32).reshape(CLIENTS, STEPS, BATCH)
  cohort = clients.Cohort(
    clients=np.arange(CLIENTS, dtype=np.int32),
    indices=indices,
    mask=np.ones(indices.shape, bool),
    weights=np.ones(CLIENTS, np.float32),
  )
  return language.loss_fn(model), factors, frozen, examples, cohort


def candidate(parts, devices: int, clients_per_step: int, density):
  """A function that runs one round and returns its seconds."""
  loss_fn, factors, frozen, examples, cohort = parts
  compress = base.identity() if density is None else sparse.top_k(density)
  mesh = clients.device_mesh(jax.devices()[:devices])
  placement = clients.Placement(mesh, clients_per_step)
  algorithm = fed_avg.fed_avg(
    loss_fn,
    optax.sgd(0.1, momentum=0.9),
    flasc.server_adamw(1e-3),
    channel=channels.Channel(compress, compress),
    placement=placement,
  )
  frozen, examples, cohort = jax.device_put(
    (frozen, examples, cohort), placement.everywhere
  )
  key = jax.random.key(SEED)
  step = jax.jit(algorithm.round, donate_argnums=0)
  state = algorithm.init(factors)

  def run() -> float:
    nonlocal state
    start = time.perf_counter()
    state, metrics = step(state, frozen, examples, cohort, key)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start

  run()  # Compiles.
  return run


def compare(candidates, repetitions: int) -> list[dict[str, float]]:
  """Medians of all candidates, and of their speed relative to the first."""
  seconds = [[run() for run in candidates] for _ in range(repetitions)]
  return [
    {
      "tokens_per_second": round(TOKENS / statistics.median(column)),
      "relative": round(
        statistics.median(
          row[0] / each for row, each in zip(seconds, column, strict=True)
        ),
        3,
      ),
    }
    for column in zip(*seconds, strict=True)
  ]


def main(repetitions: int = 7, out: pathlib.Path | None = None) -> None:
  """Measures and writes `benchmarks/results/round_placement.json`.

  Args:
    repetitions: rounds of each candidate.
    out: another file to write.
  """
  jax.config.update("jax_num_cpu_devices", 2)
  data = os.environ.get("FEDJAX_LLM_DATA", ROOT.parent / "shared" / "data")
  parts = problem(pathlib.Path(data) / "stories260k")
  load = os.getloadavg()
  placements = compare(
    [candidate(parts, *placement, None) for placement in PLACEMENTS],
    repetitions,
  )
  channels = compare(
    [candidate(parts, 1, 1, density) for density in CHANNELS], repetitions
  )
  result = {
    "what": f"{CLIENTS} clients x {STEPS} steps x {BATCH} rows x {TIME} tokens,"
    f" stories260k, LoRA rank {RANK} on all linear layers",
    "trainable_parameters": sum(jnp.size(x) for x in jax.tree.leaves(parts[1])),
    "placements": [
      {"devices": devices, "clients_per_step": size, **measured}
      for (devices, size), measured in zip(PLACEMENTS, placements, strict=True)
    ],
    "channels": [
      {
        "density": density,
        **measured,
        "share_of_compression": round(1 - measured["relative"], 3),
      }
      for density, measured in zip(CHANNELS, channels, strict=True)
    ],
    "repetitions": repetitions,
    "seed": SEED,
    "device": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}",
    "load_average_before": [round(x, 2) for x in load],
    "malloc": os.environ["GLIBC_TUNABLES"],
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "flax", "optax", "numpy")
    },
    "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
  }
  out = out or ROOT / "benchmarks" / "results" / "round_placement.json"
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(result, indent=2) + "\n")
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  if "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.argv])
  tyro.cli(main)
