"""What every family of models must do: a row a family, a column a test.

Models are made and saved by transformers, adapters by peft, both of them tiny
and random; docs/models.md shows the table.
"""

import functools
import math
import pathlib
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import (
  adapters,
  families,
  generation,
  heads,
  lora,
  pretrained,
  quantized,
)

pytestmark = [
  pytest.mark.oracle,
  pytest.mark.filterwarnings("ignore::FutureWarning"),  # Of peft.
]

# No token ends a text.
TOKENS = {
  "vocab_size": 96,
  "bos_token_id": None,
  "eos_token_id": None,
  "pad_token_id": 0,
}
ENCODER = {
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}
TEXT = TOKENS | ENCODER | {"max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 32}
WINDOW = {"sliding_window": 5}  # Shorter than the texts.
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
# The fields of each family's config, by model_type.
FAMILIES = {
  "llama": GROUPED | {"rope_parameters": LLAMA3},
  "mistral": GROUPED | WINDOW,
  "qwen2": GROUPED,
  "qwen3": WIDE,
  "gemma": WIDE,
  "gemma2": WIDE | WINDOW,
  "gemma3_text": WIDE
  | WINDOW
  | {"layer_types": ["sliding_attention", "full_attention"]},
  "gpt2": TOKENS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
  "bert": TEXT | {"num_labels": 5},
  "vit": ENCODER | {"num_labels": 5, "image_size": 12, "patch_size": 4},
}
CLASSIFIERS = {"bert": "SequenceClassification", "vit": "ImageClassification"}
LANGUAGE_MODELS = [x for x in FAMILIES if x not in CLASSIFIERS]
RANK, ALPHA = 4, 6.0


class Case(NamedTuple):
  """A family's model, and what transformers and peft compute with it.

  Attributes:
    folder: `base` is transformers', `adapter` peft's; so is `gradients`, whose
      factors are the gradients of the sum of `weights * outputs`.
    head: what classifies; None of a language model.
    inputs: tokens and which of them are real, or pixels.
    weights: of the outputs; 0 where there is padding.
    base_outputs: logits of the base model.
    outputs: logits with the adapter.
    config: what we load; so are `params`, `settings` and `factors`.
  """

  folder: pathlib.Path
  head: Any
  inputs: tuple[np.ndarray, ...]
  weights: np.ndarray
  base_outputs: np.ndarray
  outputs: np.ndarray
  config: Any
  params: Any
  settings: lora.LoRA
  factors: Any

  def model(self, adapter=None, dtype=jnp.float32):
    return families.model(self.config, adapter, self.head, dtype=dtype)

  def step(self, params, factors):
    """Our outputs with factors, and the gradients of their weighted sum."""
    step = compiled_step(self.model(self.settings))
    return step(factors, params, self.inputs, self.weights)

  def same(self, got, expected):
    """Outputs agree to 1e-4, and of the largest, but for those of padding."""
    real = self.weights != 0
    atol = 1e-4 * min(1, np.abs(expected[real]).max())
    np.testing.assert_allclose(got[real], expected[real], atol=atol, rtol=0)


# Compilation is most of the time here, and what it makes runs once or twice.
jit = functools.partial(
  jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False}
)


@functools.cache
def compiled(model):
  return jit(model.apply)


@functools.cache
def compiled_step(model):
  def total(factors, params, inputs, weights):
    outputs = model.apply({"params": params, "lora": factors}, *inputs)
    return (outputs * weights).sum(), outputs

  def step(*arguments):
    gradients, outputs = jax.grad(total, has_aux=True)(*arguments)
    return outputs, gradients

  return jit(step)


def auto_class(family):
  """The class of transformers that makes and loads a family's models."""
  import transformers

  kind = CLASSIFIERS.get(family, "CausalLM")
  return getattr(transformers, f"AutoModelFor{kind}")


def transformers_model(family, folder, adapter=None):
  """The model in a folder, and peft's adapter in another."""
  import peft

  model = auto_class(family).from_pretrained(
    folder, attn_implementation="eager"
  )
  if adapter is not None:
    model = peft.PeftModel.from_pretrained(model, adapter)
  return model.eval()


def call(model, inputs):
  """The outputs of a model of transformers or peft."""
  import torch

  if len(inputs) == 1:
    (pixels,) = inputs
    return model(pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).logits
  tokens, mask = (torch.tensor(x, dtype=torch.long) for x in inputs)
  return model(input_ids=tokens, attention_mask=mask).logits


def shake(parameters):
  """Adds noise, so that no bias, norm or factor is trivial.

  The sum is one that bfloat16 holds, so that its rounding costs nothing.
  """
  import torch

  for x in parameters:
    x.data = (x.data + 0.1 * torch.randn(x.shape)).bfloat16().float()


def save_models(family, folder):
  """Makes a model and an adapter, saves both, and returns the latter."""
  import peft
  import torch
  import transformers

  torch.manual_seed(0)
  torch.set_num_threads(1)
  model = auto_class(family).from_config(
    transformers.AutoConfig.for_model(family, **FAMILIES[family]),
    attn_implementation="eager",
  )
  shake(model.parameters())
  if family in LANGUAGE_MODELS:
    # Large ones, if they are tied, make a token repeat itself for ever.
    model.get_input_embeddings().weight.data /= 8
  model.save_pretrained(folder / "base", max_shard_size="50KB")
  assert (folder / "base" / "model.safetensors.index.json").is_file()
  head = ["classifier"] if family in CLASSIFIERS else None
  settings = peft.LoraConfig(
    r=RANK,
    lora_alpha=ALPHA,
    target_modules="all-linear",
    exclude_modules=head,
    modules_to_save=head,
    fan_in_fan_out=family == "gpt2",
    task_type={"bert": "SEQ_CLS", "vit": None}.get(family, "CAUSAL_LM"),
  )
  adapted = peft.get_peft_model(model, settings).eval()
  shake(x for x in adapted.parameters() if x.requires_grad)
  adapted.save_pretrained(folder / "adapter")
  return adapted


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  pytest.importorskip("peft", reason="oracle needs peft")
  family, folder = request.param, tmp_path_factory.mktemp(request.param)
  adapted = save_models(family, folder)
  generator = np.random.default_rng(0)
  if family == "vit":
    inputs = (generator.normal(size=(2, 12, 12, 3)).astype(np.float32),)
  else:
    mask = np.ones((2, 17), np.int32)
    mask[1, 12:] = 0
    inputs = generator.integers(1, 96, mask.shape, np.int32) * mask, mask
  outputs = call(adapted, inputs)
  weights = generator.normal(size=outputs.shape).astype(np.float32)
  if family in LANGUAGE_MODELS:
    weights *= mask[..., None]
  (outputs * torch.tensor(weights)).sum().backward()
  with adapted.disable_adapter(), torch.no_grad():
    base_outputs = call(adapted, inputs).numpy()
  for x in adapted.parameters():
    if x.requires_grad:
      x.data = x.grad
  adapted.save_pretrained(folder / "gradients")
  head = heads.Classifier(5) if family in CLASSIFIERS else None
  loaded = pretrained.load(folder / "base", head=head)
  imported = adapters.load(folder / "adapter", loaded[0])
  outputs = outputs.detach().numpy()
  return Case(
    folder, head, inputs, weights, base_outputs, outputs, *loaded, *imported
  )


def same_gradients(got, expected):
  """Gradients agree to 1e-4 of the largest of a parameter."""

  def compare(got, expected):
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_allclose(got, expected, atol=1e-4 * largest, rtol=0)

  jax.tree.map(compare, got, expected)


def test_load(case):
  got = compiled(case.model())({"params": case.params}, *case.inputs)
  case.same(got, case.base_outputs)


def test_lora(case):
  got, _ = case.step(case.params, case.factors)
  case.same(got, case.outputs)
  merged = lora.merge(case.params, case.factors, case.settings.scale)
  alone = compiled(case.model())({"params": merged}, *case.inputs)
  case.same(got, alone)
  assert np.abs(case.outputs - case.base_outputs).max() > 0.1


def test_gradients(case):
  _, got = case.step(case.params, case.factors)
  _, expected = adapters.load(case.folder / "gradients", case.config)
  same_gradients(got, expected)


def test_bfloat16(case):
  folder = case.folder / "base"
  _, params = pretrained.load(folder, head=case.head, dtype=jnp.bfloat16)
  model = case.model(case.settings, jnp.bfloat16)
  variables = {"params": params, "lora": case.factors}
  got = compiled(model)(variables, *case.inputs)
  assert got.dtype == jnp.float32
  real = case.weights != 0
  error = np.linalg.norm(got[real] - case.outputs[real])
  assert error < 0.02 * np.linalg.norm(case.outputs[real])


def kernels_of(params):
  flat = flax.traverse_util.flatten_dict(params["layers"])
  return [flat[path] for path in sorted(flat) if path[-1] == "kernel"]


def check_quantized(case, format, *, bits, error):
  folder = case.folder / "base"
  _, params = pretrained.load(folder, head=case.head, quantize=format)
  got, gradients = case.step(params, case.factors)
  plain = jax.tree.map(
    lambda x: quantized.dequantize(x, jnp.float32),
    params,
    is_leaf=lambda x: not isinstance(x, dict),
  )
  expected, expected_gradients = case.step(plain, case.factors)
  case.same(got, expected)
  same_gradients(gradients, expected_gradients)
  kernels, near, exact = map(kernels_of, (params, plain, case.params))
  weights = sum(math.prod(kernel.shape) for kernel in kernels)
  assert 8 * sum(x.nbytes for x in jax.tree.leaves(kernels)) / weights <= bits
  for x, y in zip(near, exact, strict=True):
    assert 0 < np.linalg.norm(x - y) < error * np.linalg.norm(y)


def test_int8(case):
  # An absmax has 64 inputs or more.
  check_quantized(case, "int8", bits=8 + 32 / 64, error=0.01)


def test_nf4(case):
  check_quantized(case, "nf4", bits=4.5, error=0.1)


def test_export(case, draw, tmp_path):
  factors = draw(case.factors)
  adapters.save(
    tmp_path,
    factors,
    case.settings,
    config=case.config,
    base_model=str(case.folder / "base"),
    head=case.head,
  )
  kind, base = case.config.model_type, case.folder / "base"
  reference = transformers_model(kind, base, tmp_path)
  expected = call(reference, case.inputs).detach().numpy()
  got, _ = case.step(case.params, factors)
  case.same(got, expected)


def test_import(case):
  assert (case.settings.rank, case.settings.alpha) == (RANK, ALPHA)
  layers = families.of(case.config).model.LAYERS
  assert all(case.settings.matches(layer) for layer in layers)
  lora.check(case.model(case.settings), case.factors)
  got, _ = case.step(case.params, case.factors)
  case.same(got, case.outputs)


def test_merge(case, tmp_path):
  merged = lora.merge(case.params, case.factors, case.settings.scale)
  pretrained.save(
    tmp_path,
    case.config,
    merged,
    head=case.head,
    dtype=jnp.float32,
    like=case.folder / "base",
  )
  reference = transformers_model(case.config.model_type, tmp_path)
  expected = call(reference, case.inputs).detach().numpy()
  got, _ = case.step(case.params, case.factors)
  case.same(got, expected)


@pytest.mark.parametrize("case", LANGUAGE_MODELS, indirect=True, scope="module")
def test_generate(case):
  import torch
  import transformers

  prompts = [[7, 3, 9], [11, 4, 4, 80, 2, 31, 5, 5, 17, 60, 23], [42]]
  got = generation.generate(
    case.model(case.settings),
    case.params,
    case.factors,
    prompts,
    max_new_tokens=16,
  )
  kind, base = case.config.model_type, case.folder / "base"
  longest = max(map(len, prompts))
  rows = [[0] * (longest - len(row)) + row for row in prompts]
  new = transformers_model(kind, base, case.folder / "adapter").generate(
    input_ids=torch.tensor(rows),
    attention_mask=torch.tensor(rows).ne(0).long(),
    generation_config=transformers.GenerationConfig(
      do_sample=False, max_new_tokens=16, pad_token_id=0
    ),
  )
  assert got == new[:, longest:].tolist()
  assert min(len(set(row)) for row in got) > 1
