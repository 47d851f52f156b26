"""Exact top-k by magnitude: `top_k_mask` against `jax.lax.top_k`.

  python benchmarks/top_k.py

Writes medians, in milliseconds, to benchmarks/results/top_k.json. The two take
turns, so that what else the machine does slows both alike.
"""

import datetime
import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.compression import sparse

SIZES = (36_864, 294_912, 1_000_000)
DENSITY = 1 / 16
REPEATS = 21
RESULTS = pathlib.Path(__file__).parent / "results" / "top_k.json"


def measure(n):
  vector = jax.random.normal(jax.random.key(n), (n,))
  k = int(n * DENSITY)
  programs = {
    "top_k_mask": jax.jit(lambda x: sparse.top_k_mask(x, k)),
    "lax.top_k": jax.jit(lambda x: jax.lax.top_k(jnp.abs(x), k)[1]),
  }
  mask, indices = (program(vector) for program in programs.values())
  np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(indices))
  times = {name: [] for name in programs}
  for _ in range(REPEATS):
    for name, program in programs.items():
      start = time.perf_counter()
      program(vector).block_until_ready()
      times[name].append(1e3 * (time.perf_counter() - start))
  medians = {name: statistics.median(times[name]) for name in programs}
  return {"n": n, "k": k} | {
    f"{name} ms": round(median, 3) for name, median in medians.items()
  }


def main():
  device = jax.devices()[0]
  result = {
    "date": datetime.date.today().isoformat(),
    "device": f"{device.platform}: {device.device_kind}",
    "machine": f"{platform.machine()}, Python {platform.python_version()}",
    "jax": jax.__version__,
    "repeats": REPEATS,
    "rows": [measure(n) for n in SIZES],
  }
  RESULTS.parent.mkdir(exist_ok=True)
  RESULTS.write_text(json.dumps(result, indent=2) + "\n")
  print(RESULTS.read_text())


if __name__ == "__main__":
  main()
