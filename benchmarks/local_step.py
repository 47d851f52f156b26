"""One local step: loss and LoRA gradients of stories260k, in several ways.

  python benchmarks/local_step.py

Rank 8 on all linear layers, 6 rows of 96 tokens. Writes what each way costs to
benchmarks/results/local_step.json. The ways take turns, so that what else the
machine does slows all alike; the fastest of the calls is the least disturbed.
"""

import datetime
import functools
import json
import os
import pathlib
import platform
import time
from typing import Any
from unittest import mock

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models import decoder, language, lora, pretrained

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / "results" / "local_step.json"
DATA = os.environ.get("FEDJAX_LLM_DATA", ROOT.parent.parent / "shared" / "data")
ROWS, LENGTH = 6, 96
REPEATS = 60


def einsum_attention(query, key, value, *, is_causal):
  """Grouped-query attention written out."""
  del is_causal  # Always.
  batch, time, heads, width = query.shape
  query = query.reshape(batch, time, key.shape[2], -1, width) * width**-0.5
  scores = jnp.einsum("btkgd,bskd->bkgts", query, key)
  causal = np.tril(np.ones((time, time), bool))
  scores = jnp.where(causal, scores, jnp.finfo(jnp.float32).min)
  y = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), value)
  return y.reshape(batch, time, heads, width)


# What each way changes in the library: (module, name, replacement).
EINSUM = (jax.nn, "dot_product_attention", einsum_attention)
KEPT = (jax, "checkpoint", lambda fn, **_: fn)
UNROLLED = (nn, "scan", functools.partial(nn.scan, unroll=5))
WAYS = {
  "library": (),
  "unrolled": (UNROLLED,),
  "probabilities kept": (KEPT,),
  "probabilities kept, unrolled": (KEPT, UNROLLED),
  "einsum attention": (EINSUM,),
  "einsum attention, unrolled": (EINSUM, UNROLLED),
}


def mebibytes(program):
  """What it allocates beside its arguments and results."""
  analysis: Any = program.memory_analysis()
  return round(analysis.temp_size_in_bytes / 2**20, 1)


def compile_step(changes, config, params, tokens):
  """The compiled step, its factors, and the seconds that compiling took."""
  model = decoder.Decoder(config, lora.LoRA(8, 16.0, targets=decoder.LINEAR))
  factors = lora.init(model, jax.random.key(1))

  def loss(factors, params, tokens):
    variables = {"params": params, "lora": factors}
    logits: Any = model.apply(variables, tokens[:, :-1])
    return language.token_losses(logits, tokens[:, 1:]).mean()

  start = time.perf_counter()
  patches = [mock.patch.object(*change) for change in changes]
  for patch in patches:
    patch.start()
  try:
    lowered = jax.jit(jax.value_and_grad(loss)).lower(factors, params, tokens)
  finally:
    for patch in patches:
      patch.stop()
  return lowered.compile(), factors, time.perf_counter() - start


def main():
  config, params = pretrained.load(pathlib.Path(DATA) / "stories260k")
  tokens = jax.random.randint(
    jax.random.key(0), (ROWS, LENGTH + 1), 0, config.vocab_size
  )
  steps = {
    name: compile_step(changes, config, params, tokens)
    for name, changes in WAYS.items()
  }
  times = {name: [] for name in steps}
  losses = {
    name: step(f, params, tokens)[0] for name, (step, f, _) in steps.items()
  }
  np.testing.assert_allclose(
    list(losses.values()), losses["library"], rtol=1e-5
  )
  for _ in range(REPEATS):
    for name, (step, factors, _) in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(step(factors, params, tokens))
      times[name].append(time.perf_counter() - start)
  device = jax.devices()[0]
  result = {
    "date": datetime.date.today().isoformat(),
    "device": f"{device.platform}: {device.device_kind}",
    "machine": f"{platform.machine()}, Python {platform.python_version()}",
    "cores": os.cpu_count(),
    "load": round(os.getloadavg()[0], 1),
    "jax": jax.__version__,
    "flax": flax.__version__,
    "tokens": ROWS * LENGTH,
    "repeats": REPEATS,
    "rows": [
      {
        "way": name,
        "tokens/s": round(ROWS * LENGTH / min(times[name])),
        "fastest ms": round(1e3 * min(times[name]), 2),
        "median ms": round(1e3 * float(np.median(times[name])), 2),
        "compile s": round(seconds, 2),
        "temporary MiB": mebibytes(step),
      }
      for name, (step, _, seconds) in steps.items()
    ],
  }
  RESULTS.parent.mkdir(exist_ok=True)
  RESULTS.write_text(json.dumps(result, indent=2) + "\n")
  print(RESULTS.read_text())


if __name__ == "__main__":
  main()
