"""A frozen base in float32, bfloat16, int8 and NF4: what each costs in error.

  python benchmarks/quantized_base.py

The logits, the loss and the LoRA gradients of stories260k on the text it was
trained on, against those of its float32 weights computed in float32. Writes a
row for each format and each dtype of the activations to
benchmarks/results/quantized_base.json.
"""

import datetime
import json
import os
import pathlib
import platform
from typing import Any

import flax
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import tabulate
import transformers

from fedjax_llm.models import decoder, language, lora, pretrained, quantized

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / "results" / "quantized_base.json"
DATA = pathlib.Path(
  os.environ.get("FEDJAX_LLM_DATA", ROOT.parent.parent / "shared" / "data")
)
BASES = ("float32", "bfloat16", "int8", "nf4")
ROWS, LENGTH = 32, 256
SEED = 0


def read_tokens(folder):
  """Consecutive text as rows that start with the first token of a document."""
  tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
  path = DATA / "tinystories_sample" / "tinystories_train_head.txt"
  text = path.read_text(encoding="utf-8")[: 8 * ROWS * LENGTH]
  ids = tokenizer(text, add_special_tokens=False)["input_ids"]
  rows = np.array(ids[: ROWS * LENGTH], np.int32).reshape(ROWS, LENGTH)
  return np.pad(rows, ((0, 0), (1, 0)), constant_values=tokenizer.bos_token_id)


def load(folder, base):
  """The parameters as the base's format has them."""
  is_quantized = base in ("int8", "nf4")
  kind = {"quantize": base} if is_quantized else {"dtype": jnp.dtype(base)}
  return pretrained.load(folder, **kind)[1]


def nbytes(params):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def differentiate(model, factors, params, tokens):
  """The loss, the logits, and the LoRA gradients as one vector."""

  def loss(factors):
    variables = {"params": params, "lora": factors}
    logits: Any = model.apply(variables, tokens[:, :-1])
    return language.token_losses(logits, tokens[:, 1:]).mean(), logits

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, logits), gradient = step(factors)
  flat = jax.flatten_util.ravel_pytree(gradient)[0]
  return value, logits, np.asarray(flat, np.float64)


def compare(reference, got):
  """Errors of (loss, logits, gradient) against the reference's."""
  loss, logits, gradient = got
  true_loss, true_logits, true_gradient = reference
  error = np.asarray(logits - true_logits, np.float64)
  log_p, log_q = map(jax.nn.log_softmax, (true_logits, logits))
  divergence = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
  norm = np.linalg.norm
  cosine = gradient @ true_gradient / norm(gradient) / norm(true_gradient)
  return {
    "logit RMS error": round(float(np.sqrt((error**2).mean())), 6),
    "logit max error": round(float(np.abs(error).max()), 5),
    "KL nats": float(f"{float(divergence.mean()):.3g}"),
    "loss": round(float(loss), 5),
    "loss change": round(float(loss - true_loss), 5),
    "gradient cosine": round(float(cosine), 6),
    "gradient relative error": round(
      float(norm(gradient - true_gradient) / norm(true_gradient)), 5
    ),
  }


def kernels(params):
  """The kernels of the layers, quantised or not."""
  is_kernel = lambda x: isinstance(x, quantized.Int8 | quantized.NF4)
  leaves = jax.tree.leaves_with_path(params["layers"], is_leaf=is_kernel)
  return [leaf for path, leaf in leaves if path[-1].key == "kernel"]


def describe(params, stored):
  """Bits of a weight of the layers, and how far they are from `params`."""
  exact = jax.flatten_util.ravel_pytree(kernels(params))[0]
  plain = [quantized.dequantize(x, jnp.float32) for x in kernels(stored)]
  error = jax.flatten_util.ravel_pytree(plain)[0] - exact
  bits = 8 * nbytes(kernels(stored)) / exact.size
  relative = float(jnp.linalg.norm(error) / jnp.linalg.norm(exact))
  return {
    "bits a layer weight": round(bits, 3),
    "relative error of them": round(relative, 5),
    "base bytes": nbytes(stored),
  }


def measure():
  folder = DATA / "stories260k"
  config, params = pretrained.load(folder)
  tokens = read_tokens(folder)
  adapter = lora.LoRA(8, 16.0, targets=decoder.LINEAR)
  # Of a random `b`: where it is zero, as at the start, `a` has no gradient.
  factors = lora.init(decoder.Decoder(config, adapter), jax.random.key(SEED))
  noise = np.random.default_rng(SEED).standard_normal
  factors = jax.tree.map_with_path(
    lambda path, leaf: (
      leaf
      if path[-1].key == "a"
      else jnp.asarray(0.02 * noise(leaf.shape), jnp.float32)
    ),
    factors,
  )
  frozen = {base: load(folder, base) for base in BASES}
  outputs = {}
  for activations in ("float32", "bfloat16"):
    model = decoder.Decoder(config, adapter, dtype=jnp.dtype(activations))
    for base in BASES:
      output = differentiate(model, factors, frozen[base], tokens)
      outputs[base, activations] = output
  reference = outputs["float32", "float32"]
  rows = [
    {
      "base": base,
      "activations": activations,
      **describe(params, frozen[base]),
      **compare(reference, output),
    }
    for (base, activations), output in outputs.items()
  ]
  logits = np.asarray(reference[1], np.float64)
  return {
    "logit RMS": round(float(np.sqrt((logits**2).mean())), 4),
    "rows": rows,
  }


def main():
  device = jax.devices()[0]
  result = {
    "date": datetime.date.today().isoformat(),
    "device": f"{device.platform}: {device.device_kind}",
    "machine": f"{platform.machine()}, Python {platform.python_version()}",
    "jax": jax.__version__,
    "flax": flax.__version__,
    "model": "stories260k",
    "tokens": ROWS * LENGTH,
    "adapter": "rank 8 on all linear layers",
    "seed": SEED,
    **measure(),
  }
  RESULTS.parent.mkdir(exist_ok=True)
  RESULTS.write_text(json.dumps(result, indent=2) + "\n")
  print(tabulate.tabulate(result["rows"], headers="keys"))


if __name__ == "__main__":
  main()
