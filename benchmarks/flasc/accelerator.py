"""FLASC's rounds on an accelerator: seconds, memory, bytes and compiling.

  python -m benchmarks.flasc.accelerator [--seconds 660] [--toy]

Needs no network, no data and no weights: the shapes are real, the weights and
tokens are random. The base is bfloat16, the factors have rank 16 on all linear
layers. Each row is written when it is measured, to the file of the device in
`benchmarks/results/flasc_accelerator`; nothing begins after so many seconds.

The channels of a model take turns, and `relative` is the median of their ratios
to the dense round of the same turn. `share_of_peak` counts 4 FLOPs a token and
parameter, because frozen kernels have no gradients, against the bfloat16 matrix
product of the device, which is measured first.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm import compression
from fedjax_llm.data import batches
from fedjax_llm.federated import channels, clients
from fedjax_llm.federated.algorithms import fed_avg, flasc
from fedjax_llm.models import families, language, lora

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "flasc_accelerator"
RANK, TURNS = 16, 5
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA += ("gate_proj", "up_proj", "down_proj")


class Shape(NamedTuple):
  """A model and the size of its round.

  Attributes:
    fields: fields of the model's config.json.
    targets: the layers that get factors.
    clients: clients in a round.
    steps: local steps of a client.
    rows: rows of a step.
    tokens: tokens of a row.
    clients_per_step: numbers of clients trained at once.
  """

  fields: dict[str, Any]
  targets: tuple[str, ...]
  clients: int
  steps: int
  rows: int
  tokens: int
  clients_per_step: tuple[int, ...]


def llama(hidden, inner, layers, heads, key_value_heads, vocabulary):
  """The config.json of a Llama."""
  return dict(
    model_type="llama",
    hidden_size=hidden,
    intermediate_size=inner,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=key_value_heads,
    vocab_size=vocabulary,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    hidden_act="silu",
    tie_word_embeddings=True,
  )


def gpt2(hidden, layers, heads, vocabulary):
  """The config.json of a GPT-2."""
  return dict(
    model_type="gpt2",
    n_embd=hidden,
    n_layer=layers,
    n_head=heads,
    vocab_size=vocabulary,
    n_positions=1024,
    layer_norm_epsilon=1e-5,
    activation_function="gelu_new",
  )


GPT2 = ("c_attn", "c_proj", "c_fc")
# In the order of what they tell.
SHAPES = {
  "GPT-2 small": Shape(
    gpt2(768, 12, 12, 50257), GPT2, 10, 2, 16, 128, (1, 2, 5, 10)
  ),
  "SmolLM2-135M": Shape(
    llama(576, 1536, 30, 9, 3, 49152), LLAMA, 16, 2, 8, 128, (1, 4, 16)
  ),
  "Llama 3.2 1B": Shape(
    llama(2048, 8192, 16, 32, 8, 128256), LLAMA, 4, 2, 8, 512, (1, 4)
  ),
}
TOYS = {
  "toy GPT-2": Shape(gpt2(32, 2, 2, 64), GPT2, 4, 2, 2, 8, (1, 4)),
  "toy Llama": Shape(llama(32, 64, 2, 4, 2, 64), LLAMA, 4, 1, 2, 8, (1,)),
}


def few_bits(density: float) -> compression.Compressor:
  """A Top-K whose values have four bits."""
  return compression.chain(compression.top_k(density), compression.lloyd_max(4))


CHANNELS = {
  "dense": compression.identity(),
  "FLASC, 1/4": compression.top_k(1 / 4),
  "FLASC, 1/16": compression.top_k(1 / 16),
  "FLASC, 1/16, 4 bits": few_bits(1 / 16),
}


def main() -> None:
  """Measures every model and channel, as long as there is time."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--seconds", type=float, default=660)
  parser.add_argument("--toy", action="store_true", help="tiny shapes")
  parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
  given = parser.parse_args()
  device = jax.devices()[0].device_kind
  given.out.mkdir(parents=True, exist_ok=True)
  path = given.out / f"{device.replace(' ', '_').lower()}.jsonl"
  path.write_text("")
  end = time.perf_counter() + given.seconds

  def write(**row):
    with path.open("a") as file:
      file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)

  peak = peak_flops(256 if given.toy else 8192)
  write(
    what="device",
    device=f"{jax.device_count()} x {device}",
    peak_tflops=round(peak / 1e12, 3),
    versions={
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "flax", "optax")
    },
    date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    rank=RANK,
    turns=TURNS,
  )
  for name, shape in (TOYS if given.toy else SHAPES).items():
    measure(name, shape, peak, end, write)
  write(what="done")


def measure(name, shape, peak, end, write):
  """The rounds of a model: placements of the dense one, then channels."""
  parts = problem(shape)
  best = None
  for width in shape.clients_per_step:
    if time.perf_counter() > end:
      write(what="placement", model=name, skipped="no time left")
      break
    try:
      dense = run, about = candidate(parts, CHANNELS["dense"], width)
      seconds = statistics.median(run() for _ in range(TURNS))
    except jax.errors.JaxRuntimeError as error:  # Mostly out of memory.
      write(
        what="placement",
        model=name,
        clients_per_step=width,
        error=str(error)[:200],
      )
      continue
    tokens = shape.clients * shape.steps * shape.rows * shape.tokens
    write(
      what="placement",
      model=name,
      clients_per_step=width,
      round=f"{shape.clients} x {shape.steps} x {shape.rows} x {shape.tokens}",
      seconds=round(seconds, 5),
      tokens_per_second=round(tokens / seconds),
      share_of_peak=round(4 * parts[-1] * tokens / seconds / peak, 4),
      **about,
    )
    if best is None or seconds < best[0]:
      best = seconds, width, dense
  if best is None:
    return
  _, width, dense = best
  runs = {"dense": dense}
  for channel, compressor in CHANNELS.items():
    if channel in runs:
      continue
    if time.perf_counter() > end:
      write(what="channel", model=name, channel=channel, skipped="no time left")
      break
    runs[channel] = candidate(parts, compressor, width)
  turns = [{x: run() for x, (run, _) in runs.items()} for _ in range(TURNS)]
  for channel, (_, about) in runs.items():
    write(
      what="channel",
      model=name,
      channel=channel,
      clients_per_step=width,
      seconds=round(statistics.median(x[channel] for x in turns), 5),
      relative=round(
        statistics.median(x[channel] / x["dense"] for x in turns), 3
      ),
      **about,
    )


def problem(shape):
  """The loss, random weights, factors and tokens, and how many weights work."""
  adapter = lora.LoRA(RANK, float(RANK), targets=shape.targets)
  config = families.from_hugging_face(shape.fields)
  model = families.model(config, adapter, dtype=jnp.bfloat16)
  shapes = lora.abstract_variables(model)["params"]
  leaves, tree = jax.tree.flatten(shapes)
  draw = jax.jit(
    lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16),
    static_argnums=1,
  )
  frozen = jax.tree.unflatten(
    tree, [draw(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
  )
  rows = shape.clients * shape.steps * shape.rows
  tokens = np.random.default_rng(0).integers(
    shape.fields["vocab_size"], size=(rows, shape.tokens + 1)
  )
  indices = np.arange(rows, dtype=np.int32)
  indices = indices.reshape(shape.clients, shape.steps, shape.rows)
  cohort = clients.Cohort(
    clients=np.arange(shape.clients, dtype=np.int32),
    indices=indices,
    mask=np.ones(indices.shape, bool),
    weights=np.ones(shape.clients, np.float32),
  )
  examples = batches.Examples(
    tokens.astype(np.int32), np.ones((rows, shape.tokens), bool)
  )
  return (
    language.loss_fn(model),
    lora.init(model, jax.random.key(0)),
    *jax.device_put((frozen, examples, cohort)),
    multiplied(config, shapes),
  )


def multiplied(config, shapes):
  """How many weights a token is multiplied by: kernels and the output layer."""
  found = jax.tree_util.tree_leaves_with_path(shapes)
  # The embeddings are tied to the output layer.
  return sum(
    x.size
    for path, x in found
    if path[-1].key == "kernel" or x.shape[0] == config.vocab_size
  )


def candidate(parts, compressor, width):
  """A function that runs a round and returns its seconds; and what it costs."""
  loss_fn, factors, frozen, examples, cohort, _ = parts
  algorithm = fed_avg.fed_avg(
    loss_fn,
    optax.sgd(1e-3, momentum=0.9),
    flasc.server_adamw(1e-3),
    channel=channels.Channel(compressor, compressor),
    placement=clients.Placement(clients_per_step=width),
  )
  key = jax.random.key(0)
  state = algorithm.init(factors)
  start = time.perf_counter()
  step = jax.jit(algorithm.round)
  compiled = step.lower(state, frozen, examples, cohort, key).compile()
  compiling = time.perf_counter() - start
  memory: Any = compiled.memory_analysis()

  def run():
    nonlocal state
    start = time.perf_counter()
    state, metrics = compiled(state, frozen, examples, cohort, key)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start

  run()
  _, metrics = compiled(state, frozen, examples, cohort, key)
  return run, {
    "compile_seconds": round(compiling, 2),
    "temporary_mib": memory and round(memory.temp_size_in_bytes / 2**20, 1),
    "download_bytes": int(np.sum(metrics["download_bytes"])),
    "upload_bytes": int(np.sum(metrics["upload_bytes"])),
  }


def peak_flops(size):
  """FLOPs a second of the fastest of some bfloat16 matrix products."""
  x = jnp.ones((size, size), jnp.bfloat16)
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  seconds = []
  for _ in range(TURNS):
    start = time.perf_counter()
    product(x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


if __name__ == "__main__":
  main()
