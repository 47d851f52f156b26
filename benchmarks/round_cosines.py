"""What the two cosines of a round cost: seconds and temporary memory.

  python benchmarks/round_cosines.py

The same round with and without `update_cosine` and `innovation_cosine`, for a
few numbers of trainable parameters, on one device and on two. Local training is
one step on a loss that costs next to nothing, so that the shares of a real
round are smaller. Both candidates take turns, so that what else the machine
does cancels out.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from fedjax_llm.compression import sparse
from fedjax_llm.federated import channels, clients
from fedjax_llm.federated.algorithms import fed_avg

ROOT = pathlib.Path(__file__).parent.parent
CLIENTS, DENSITY, SEED = 8, 1 / 4, 0
SIZES = (2**16, 2**18, 2**20, 2**22)
DEVICES = (1, 2)


def loss_fn(trainable, frozen, examples, mask, key):
  """Pulls every parameter towards a number of the example."""
  del frozen, key
  far = (trainable[None] - examples[:, None]) ** 2
  return jnp.where(mask, far.mean(axis=1), 0).sum(), mask.sum()


def candidate(size: int, devices: int, cosines: bool):
  """A function that runs one round and returns its seconds, and its memory."""
  placement = clients.Placement(
    clients.device_mesh(jax.devices()[:devices]), 1, cosines
  )
  algorithm = fed_avg.fed_avg(
    loss_fn,
    optax.sgd(0.1),
    optax.sgd(1.0),
    channel=channels.Channel(upload=sparse.top_k(DENSITY)),
    placement=placement,
  )
  cohort = clients.Cohort(
    clients=np.arange(CLIENTS, dtype=np.int32),
    indices=np.arange(CLIENTS, dtype=np.int32).reshape(CLIENTS, 1, 1),
    mask=np.ones((CLIENTS, 1, 1), bool),
    weights=np.ones(CLIENTS, np.float32),
  )
  examples = np.random.default_rng(SEED).normal(size=CLIENTS)
  shared = jax.device_put(
    ((), examples.astype(np.float32), cohort), placement.everywhere
  )
  key = jax.random.key(SEED)
  state = algorithm.init(jnp.zeros(size))
  compiled = (
    jax.jit(algorithm.round, donate_argnums=0)
    .lower(state, *shared, key)
    .compile()
  )

  def run() -> float:
    nonlocal state
    start = time.perf_counter()
    state, metrics = compiled(state, *shared, key)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start

  run()  # Touches all memory once.
  return run, compiled.memory_analysis().temp_size_in_bytes


def measure(size: int, devices: int, repetitions: int) -> dict[str, float]:
  """Medians with and without the cosines."""
  (bare, bare_bytes), (full, full_bytes) = (
    candidate(size, devices, cosines) for cosines in (False, True)
  )
  pairs = [(bare(), full()) for _ in range(repetitions)]
  without, measured = (statistics.median(x) for x in zip(*pairs, strict=True))
  return {
    "trainable_parameters": size,
    "devices": devices,
    "milliseconds_without": round(1e3 * without, 2),
    "milliseconds_with": round(1e3 * measured, 2),
    "more_milliseconds_a_client": round(
      1e3 * statistics.median(y - x for x, y in pairs) / CLIENTS, 3
    ),
    "temporary_bytes_without": bare_bytes,
    "temporary_bytes_with": full_bytes,
  }


def main(repetitions: int = 21, out: pathlib.Path | None = None) -> None:
  """Measures and writes `benchmarks/results/round_cosines.json`.

  Args:
    repetitions: rounds of each candidate.
    out: another file to write.
  """
  jax.config.update("jax_num_cpu_devices", 2)
  load = os.getloadavg()
  rows = [
    measure(size, devices, repetitions) for size in SIZES for devices in DEVICES
  ]
  result = {
    "what": f"{CLIENTS} clients, one step each, Top-K uploads of {DENSITY}",
    "rounds": rows,
    "repetitions": repetitions,
    "seed": SEED,
    "device": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}",
    "load_average_before": [round(x, 2) for x in load],
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "optax", "numpy")
    },
    "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
  }
  out = out or ROOT / "benchmarks" / "results" / "round_cosines.json"
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(result, indent=2) + "\n")
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  tyro.cli(main)
