"""Loading a checkpoint of several shards: seconds and peak memory.

  python benchmarks/load_checkpoint.py

Makes a random bfloat16 checkpoint of Llama 3.2 1B's shapes, eight layers deep,
in a temporary folder, and loads it in every format and placement, each in a
process of its own. That process is watched from outside, on Linux: its
anonymous memory (`RssAnon`) every few milliseconds, above what it had with
everything imported. Pages of the mapped files come on top; the system drops
them when it needs room, so the high water mark with them (`VmHWM`) is apart.

The devices are the host's: what a second one holds is host memory too. The
files are in the page cache, so the seconds are those of the processor.
transformers maps bfloat16 parameters where they lie, which stacked layers
cannot be; its rows touch every page, so that they are read at all.
"""

import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import tabulate
import tyro

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / "results" / "load_checkpoint.json"
LAYERS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS = 8, 2048, 8192, 32, 8
VOCABULARY = 128_256
SHARD_BYTES = 500_000_000
SEED = 0
FORMATS = ("bfloat16", "float32", "int8", "nf4")
PLACEMENTS = ("one device", "two, replicated", "two, layers split")
MIB = 2**20


def tensors():
  """Names and shapes as in a checkpoint of the hub."""
  head_dim = HIDDEN // HEADS
  yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
  for layer in range(LAYERS):
    prefix = f"model.layers.{layer}."
    yield prefix + "input_layernorm.weight", (HIDDEN,)
    yield prefix + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)
    yield prefix + "self_attn.k_proj.weight", (KV_HEADS * head_dim, HIDDEN)
    yield prefix + "self_attn.v_proj.weight", (KV_HEADS * head_dim, HIDDEN)
    yield prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)
    yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
    yield prefix + "mlp.gate_proj.weight", (FEED_FORWARD, HIDDEN)
    yield prefix + "mlp.up_proj.weight", (FEED_FORWARD, HIDDEN)
    yield prefix + "mlp.down_proj.weight", (HIDDEN, FEED_FORWARD)
  yield "model.norm.weight", (HIDDEN,)


def shards():
  """Gathers consecutive tensors up to the size of a shard."""
  shard, size = {}, 0
  for name, shape in tensors():
    nbytes = 2 * int(np.prod(shape))
    if shard and size + nbytes > SHARD_BYTES:
      yield shard
      shard, size = {}, 0
    shard[name] = shape
    size += nbytes
  yield shard


def generate(folder):
  """Writes the checkpoint, a shard in memory at a time; returns its bytes."""
  rng = np.random.default_rng(SEED)
  # Rows of one table in random order: drawing every number would take minutes.
  table = (0.02 * rng.standard_normal((4096, HIDDEN), np.float32)).astype(
    ml_dtypes.bfloat16
  )
  weight_map, count = {}, len(list(shards()))
  for number, shard in enumerate(shards(), 1):
    name = f"model-{number:05d}-of-{count:05d}.safetensors"
    weights = {
      tensor: table[
        rng.integers(len(table), size=int(np.prod(shape)) // HIDDEN)
      ].reshape(shape)
      for tensor, shape in shard.items()
    }
    safetensors.numpy.save_file(weights, folder / name, {"format": "pt"})
    weight_map |= dict.fromkeys(shard, name)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
  }
  (folder / "config.json").write_text(json.dumps(config))
  return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def load_with_transformers(folder, format):
  """As `load`, by transformers."""
  import torch
  import transformers

  yield
  model: Any = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, format)
  )
  parameters = list(model.parameters())
  for parameter in parameters:
    parameter.view(torch.int16).max()
  yield sum(x.numel() * x.element_size() for x in parameters)


def load(folder, format, placement):
  """Imports; then loads, and yields the bytes that the devices hold."""
  import jax

  from fedjax_llm.models import pretrained

  jax.config.update("jax_num_cpu_devices", 2)
  mesh = jax.make_mesh(
    (1 if placement == "one device" else 2,),
    ("x",),
    axis_types=(jax.sharding.AxisType.Auto,),
  )
  spec = jax.P("x") if placement == "two, layers split" else jax.P()
  yield
  is_quantized = format in ("int8", "nf4")
  _, params = pretrained.load(
    folder,
    dtype="bfloat16" if is_quantized else format,
    quantize=format if is_quantized else None,
    sharding=jax.sharding.NamedSharding(mesh, spec),
  )
  leaves = jax.block_until_ready(jax.tree.leaves(params))
  yield sum(x.data.nbytes for leaf in leaves for x in leaf.addressable_shards)


def child(folder, format, placement):
  """What the watched process does."""
  way = (
    load_with_transformers(folder, format)
    if placement == "transformers"
    else load(folder, format, placement)
  )
  next(way)
  print("ready", flush=True)
  sys.stdin.readline()
  start = time.perf_counter()
  nbytes = next(way)
  print(json.dumps([time.perf_counter() - start, nbytes]), flush=True)
  sys.stdin.readline()


def memory(process):
  """Fields of a process's memory, in bytes."""
  lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
  fields = dict(line.split(":", 1) for line in lines)
  names = ("RssAnon", "VmRSS", "VmHWM")
  return {name: 1024 * int(fields[name].split()[0]) for name in names}


def watch(process, is_done, samples):
  """Appends the anonymous memory of a process, about every 2 ms."""
  while not is_done.wait(0.002):
    samples.append(memory(process)["RssAnon"])


def measure(folder, library, format, placement):
  """Loads in a process of its own; its seconds and bytes."""
  with subprocess.Popen(
    [sys.executable, __file__, "child", str(folder), format, placement],
    env=os.environ | {"PYTHONPATH": str(library)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    stdin: Any = process.stdin
    stdout: Any = process.stdout
    stdout.readline()
    before, samples = memory(process.pid), []
    is_done = threading.Event()
    watcher = threading.Thread(
      target=watch, args=(process.pid, is_done, samples)
    )
    watcher.start()
    print(file=stdin, flush=True)
    seconds, nbytes = json.loads(stdout.readline())
    is_done.set()
    watcher.join()
    after = memory(process.pid)
    print(file=stdin, flush=True)
  return {
    "seconds": seconds,
    "parameters": nbytes,
    "peak": max(samples) - before["RssAnon"],
    "with files": after["VmHWM"] - before["VmRSS"],
    "samples": len(samples) / seconds,
  }


def summarize(runs, file_bytes):
  """A row: the fewest seconds, the least disturbed, and the largest peak."""
  seconds = min(run["seconds"] for run in runs)
  nbytes = runs[0]["parameters"]
  peak = max(run["peak"] for run in runs)
  return {
    "seconds": round(seconds, 2),
    "seconds a GB of file": round(1e9 * seconds / file_bytes, 2),
    "parameters MiB": round(nbytes / MIB),
    "peak MiB": round(peak / MIB),
    "peak / parameters": round(peak / nbytes, 3),
    "beside them MiB": round((peak - nbytes) / MIB),
    "with files MiB": round(max(run["with files"] for run in runs) / MIB),
    "samples a second": round(min(run["samples"] for run in runs)),
  }


def main(
  repeats: int = 3,
  against: pathlib.Path | None = None,
  out: pathlib.Path = RESULTS,
) -> None:
  """Measures and writes `benchmarks/results/load_checkpoint.json`.

  Args:
    repeats: how often each way is measured; the ways take turns.
    against: another checkout of the library, that takes turns as well.
    out: the file to write.
  """
  libraries = {"this": ROOT.parent} | ({"other": against} if against else {})
  ways = list(itertools.product(FORMATS, PLACEMENTS, libraries))
  if importlib.util.find_spec("torch"):
    ways += [(x, "transformers", "this") for x in ("bfloat16", "float32")]
  runs = {way: [] for way in ways}
  load = os.getloadavg()
  with tempfile.TemporaryDirectory() as folder:
    file_bytes = generate(pathlib.Path(folder))
    for _ in range(repeats):
      for format, placement, library in ways:
        run = measure(folder, libraries[library], format, placement)
        runs[format, placement, library].append(run)
  rows = [
    {"format": format, "placement": placement}
    | ({"library": library} if against else {})
    | summarize(runs[format, placement, library], file_bytes)
    for format, placement, library in ways
  ]
  result = {
    "date": datetime.date.today().isoformat(),
    "device": "cpu: two host devices",
    "machine": f"{platform.machine()}, Python {platform.python_version()}",
    "cores": os.cpu_count(),
    "load average before": [round(x, 2) for x in load],
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "numpy", "safetensors", "transformers")
    },
    "checkpoint": f"Llama 3.2 1B cut to {LAYERS} layers, bfloat16,"
    f" {len(list(shards()))} shards, {file_bytes / 1e9:.2f} GB",
    "largest parameter MiB": round(2 * VOCABULARY * HIDDEN / MIB),
    "largest stacked kernel MiB": round(
      2 * LAYERS * HIDDEN * FEED_FORWARD / MIB
    ),
    "repeats": repeats,
    "seed": SEED,
    "rows": rows,
  }
  out.parent.mkdir(exist_ok=True)
  out.write_text(json.dumps(result, indent=2) + "\n")
  print(tabulate.tabulate(rows, headers="keys"))


if __name__ == "__main__":
  if sys.argv[1:2] == ["child"]:
    child(*sys.argv[2:])
  else:
    tyro.cli(main)
