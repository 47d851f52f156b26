import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm.models import (
  adapters,
  gpt2,
  heads,
  language,
  lora,
  pretrained,
)

# All widths differ, so that a shape tells which layer it belongs to.
BASE = gpt2.GPT2Config(
  vocab_size=96,
  hidden_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=32,
)
VARIANTS = {
  "gpt2": {},
  "untied_exact_gelu": {"tie_word_embeddings": False, "hidden_act": "gelu"},
  "narrow_relu": {"intermediate_size": 40, "hidden_act": "relu"},
  "unscaled_silu": {"scale_attn_weights": False, "hidden_act": "silu"},
  "scaled_by_layer": {
    "scale_attn_by_inverse_layer_idx": True,
    "layer_norm_epsilon": 0.1,
  },
}
ALL = lora.LoRA(rank=3, alpha=6.0, targets=("c_attn", "c_fc", "c_proj"))
LABELS = heads.Classifier(5)


@pytest.fixture
def config():
  return BASE


@pytest.fixture(params=VARIANTS)
def variant(request):
  return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def tokens():
  """Rows without the padding token, which is 0."""
  return np.random.default_rng(0).integers(1, 96, (3, 17), np.int32)


@pytest.fixture
def mask(tokens):
  mask = np.ones_like(tokens)
  mask[1, :4] = mask[2, 11:] = 0  # Padding on the left, and on the right.
  tokens[mask == 0] = 0
  return mask


@pytest.fixture
def base_params(draw):
  """Random parameters of a base model; its norms scale by about one."""

  def make(config, head=None):
    shapes = lora.abstract_variables(gpt2.GPT2(config, head=head))["params"]
    around_one = lambda path, x: x + (path[-1].key == "scale")
    return jax.tree.map_with_path(around_one, draw(shapes))

  return make


def np_norm(x, params, config):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.layer_norm_epsilon)
  return x * params["scale"] + params["bias"]


def np_act(x, kind):
  if kind == "relu":
    return np.maximum(x, 0)
  if kind == "silu":
    return x / (1 + np.exp(-x))
  if kind == "gelu":
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return x * (1 + np.tanh(inner)) / 2


def np_dense(x, params, low, scale):
  y = x @ params["kernel"] + params["bias"]
  return y + scale * x @ low["a"] @ low["b"] if low else y


def np_attention(x, params, low, config, scale, number):
  """One document's attention in the layer of that number, from 0."""
  qkv = np_dense(x, params["c_attn"], low.get("c_attn"), scale)
  width = config.hidden_size // config.num_attention_heads
  out = np.zeros_like(x)
  for head in range(config.num_attention_heads):
    own = slice(head * width, (head + 1) * width)
    query, key, value = (part[:, own] for part in np.split(qkv, 3, axis=1))
    for t in range(len(x)):
      scores = np.array([query[t] @ key[s] for s in range(t + 1)])
      if config.scale_attn_weights:
        scores /= math.sqrt(width)
      if config.scale_attn_by_inverse_layer_idx:
        scores /= number + 1
      weights = np.exp(scores - scores.max())
      out[t, own] = weights / weights.sum() @ value[: t + 1]
  return np_dense(out, params["c_proj"], low.get("c_proj"), scale)


def np_gpt2(config, params, row, factors=None, scale=0.0):
  """Logits of one document, in float64 and with plain loops."""
  params, factors = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (params, factors or {})
  )
  positions = params["wpe"]["embedding"][: len(row)]
  x = params["wte"]["embedding"][row] + positions
  for i in range(config.num_hidden_layers):
    layer, low = jax.tree.map(
      lambda x, i=i: x[i], (params["layers"], factors.get("layers", {}))
    )
    y = np_norm(x, layer["ln_1"], config)
    x = x + np_attention(
      y, layer["attn"], low.get("attn", {}), config, scale, i
    )
    y = np_norm(x, layer["ln_2"], config)
    mlp, low = layer["mlp"], low.get("mlp", {})
    y = np_dense(y, mlp["c_fc"], low.get("c_fc"), scale)
    y = np_act(y, config.hidden_act)
    x = x + np_dense(y, mlp["c_proj"], low.get("c_proj"), scale)
  x = np_norm(x, params["ln_f"], config)
  if config.tie_word_embeddings:
    return x @ params["wte"]["embedding"].T
  return x @ params["lm_head"]["kernel"]


def test_logits_match_numpy(variant, base_params, tokens):
  params = base_params(variant)
  logits = jax.jit(gpt2.GPT2(variant).apply)({"params": params}, tokens)
  for row, got in zip(tokens, logits, strict=True):
    np.testing.assert_allclose(got, np_gpt2(variant, params, row), atol=1e-4)


def test_logits_with_lora_match_numpy(
  config, base_params, lora_factors, tokens
):
  model = gpt2.GPT2(config, ALL)
  params, factors = base_params(config), lora_factors(model)
  logits = jax.jit(model.apply)({"params": params, "lora": factors}, tokens)
  expected = np_gpt2(config, params, tokens[0], factors, scale=2.0)
  np.testing.assert_allclose(logits[0], expected, atol=2e-4)


@pytest.mark.parametrize(
  "spans",
  [[(4, 17)], [(0, 12)], [(0, 6), (6, 10), (10, 15)]],
  ids=["padding on the left", "padding on the right", "three documents"],
)
def test_documents_of_a_row_are_apart(config, base_params, tokens, spans):
  params, segments = base_params(config), np.zeros_like(tokens[:1])
  for number, span in enumerate(spans, 1):
    segments[0, slice(*span)] = number
  apply = jax.jit(gpt2.GPT2(config).apply)
  logits = apply({"params": params}, tokens[:1], segments)[0]
  for span in (slice(*span) for span in spans):
    expected = np_gpt2(config, params, tokens[0, span])
    np.testing.assert_allclose(logits[span], expected, atol=1e-4)


def test_a_cache_changes_nothing(variant, base_params, tokens, mask):
  model, params = gpt2.GPT2(variant), base_params(variant)
  apply = jax.jit(model.apply)
  mask[2] = 1
  whole = apply({"params": params}, tokens, mask)
  cache = model.empty_cache(len(tokens), tokens.shape[1] + 3)
  parts = []
  for part in (slice(0, 9), slice(9, 10), slice(10, 17)):
    logits, cache = apply(
      {"params": params}, tokens[:, part], mask[:, part], cache=cache
    )
    parts.append(logits)
  got = np.concatenate(parts, axis=1)
  np.testing.assert_allclose(got[mask > 0], whole[mask > 0], atol=1e-4)


def test_the_last_token_of_a_row_is_classified(
  config, base_params, lora_factors, tokens, mask
):
  model = gpt2.GPT2(config, ALL, LABELS)
  params, factors = base_params(config), lora_factors(model)
  variables = {"params": params, "lora": factors}
  apply = jax.jit(model.apply)
  scores = apply(variables, tokens, mask)
  assert scores.shape == (3, 5) and scores.dtype == jnp.float32
  for number, span in enumerate([slice(17), slice(4, 17), slice(11)]):
    alone = apply(variables, tokens[[number], span])[0]
    np.testing.assert_allclose(scores[number], alone, atol=1e-5)


def test_rows_longer_than_the_learned_positions_are_refused(
  config, base_params
):
  model, rows = gpt2.GPT2(config), jnp.ones((1, 33), jnp.int32)
  variables = {"params": base_params(config)}
  with pytest.raises(ValueError, match="at most 32 tokens.*got 33"):
    model.apply(variables, rows)
  with pytest.raises(ValueError, match="at most 32 tokens.*got 33"):
    model.empty_cache(1, 33)


def test_a_target_that_is_no_layer_is_refused(config):
  with pytest.raises(ValueError, match="q_proj.*c_attn"):
    gpt2.GPT2(config, lora.LoRA(targets=("q_proj", "c_attn")))


def gradient(model, rows, mask=None):
  """Loss and gradients of what is trained, of a language model."""
  weights = np.ones_like(rows) if mask is None else mask

  def loss(factors, params):
    variables = {"params": params, "lora": factors}
    logits = model.apply(variables, rows, mask)[:, :-1]
    losses = language.token_losses(logits, jnp.asarray(rows[:, 1:]))
    real = weights[:, 1:] * weights[:, :-1]
    return (losses * real).sum() / real.sum()

  return jax.value_and_grad(loss)


def test_programs_do_not_grow_with_depth(
  config, base_params, lora_factors, tokens, equations
):
  def size(layers):
    shape = dataclasses.replace(config, num_hidden_layers=layers)
    model = gpt2.GPT2(shape, ALL)
    factors, params = lora_factors(model), base_params(shape)
    return len(equations(gradient(model, tokens), factors, params))

  assert size(2) == size(8)


def test_rematerialisation_does_not_change_gradients(
  config, base_params, lora_factors, tokens
):
  params, results = base_params(config), []
  for remat in (False, True):
    model = gpt2.GPT2(config, ALL, remat=remat)
    step = jax.jit(gradient(model, tokens))
    results.append(step(lora_factors(model), params))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    *results,
  )


# As FLASC's code counts them (Kuo et al., 2024), with the head of 20 labels.
@pytest.mark.parametrize(
  "rank, labels, expected",
  [
    (16, None, 2_359_296),
    (1, 20, 162_816),
    (4, 20, 605_184),
    (16, 20, 2_374_656),
    (64, 20, 9_452_544),
  ],
)
def test_the_real_gpt2_trains_as_much_as_in_flasc(rank, labels, expected):
  head = labels and heads.Classifier(labels)
  adapter = dataclasses.replace(ALL, rank=rank)
  shapes = lora.abstract_variables(gpt2.GPT2(gpt2.GPT2Config(), adapter, head))
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert count(shapes["lora"]) == expected
  assert count(shapes["params"]) == 124_439_808


def rewrite(folder, change):
  path = folder / "model.safetensors"
  safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def test_what_is_saved_is_loaded_bit_for_bit(variant, base_params, tmp_path):
  params = base_params(variant)
  pretrained.save(tmp_path, variant, params, dtype=jnp.float32)
  config, loaded = pretrained.load(tmp_path)
  assert config == variant
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_the_tensor_names_of_the_hub_are_read(config, base_params, tmp_path):
  params = base_params(config)
  pretrained.save(tmp_path, config, params, dtype=jnp.float32)

  def older(tensors):
    tensors = {x.removeprefix("transformer."): y for x, y in tensors.items()}
    causal = np.tril(np.ones((1, 1, 32, 32), np.float32))
    tensors |= {f"h.{layer}.attn.bias": causal for layer in range(3)}
    tensors["h.0.attn.masked_bias"] = np.float32([-1e4])
    return tensors

  rewrite(tmp_path, older)
  _, loaded = pretrained.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_all_that_does_not_fit_is_listed(config, base_params, tmp_path):
  pretrained.save(tmp_path, config, base_params(config), dtype=jnp.float32)

  def spoil(tensors):
    tensors.pop("transformer.h.1.attn.c_attn.bias")
    kernel = tensors["transformer.h.2.mlp.c_fc.weight"]
    tensors["transformer.h.2.mlp.c_fc.weight"] = np.ascontiguousarray(kernel.T)
    return tensors | {"transformer.h.0.extra": np.zeros(3, np.float32)}

  rewrite(tmp_path, spoil)
  with pytest.raises(ValueError) as error:
    pretrained.load(tmp_path)
  message = str(error.value)
  assert "missing transformer.h.1.attn.c_attn.bias" in message
  assert "mlp.c_fc.weight has shape (96, 24), not (24, 96)" in message
  assert "unexpected transformer.h.0.extra" in message


def hugging_face(folder, adapter=None, head=None):
  """The model of a folder in transformers, with an adapter of peft's."""
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  transformers = pytest.importorskip("transformers")
  torch.set_num_threads(1)
  kind = "CausalLM" if head is None else "SequenceClassification"
  model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )
  model.config.pad_token_id = 0
  if adapter is not None:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
  return model.eval()


def call(model, tokens, mask=None):
  """Its logits, positions being those that its `generate` gives the tokens."""
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  mask = torch.tensor(np.ones_like(tokens) if mask is None else mask)
  return model(
    torch.tensor(tokens, dtype=torch.long),
    attention_mask=mask,
    position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
  ).logits


@pytest.mark.oracle
def test_logits_equal_transformers(
  variant, base_params, tokens, mask, tmp_path
):
  params = base_params(variant)
  pretrained.save(tmp_path, variant, params, dtype=jnp.float32)
  reference = hugging_face(tmp_path)
  apply = jax.jit(gpt2.GPT2(variant).apply)
  for given in (None, mask):
    expected = call(reference, tokens, given).detach().numpy()
    got = apply({"params": params}, tokens, given)
    real = np.ones_like(mask) > 0 if given is None else mask > 0
    np.testing.assert_allclose(got[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.oracle
def test_bfloat16_logits_are_near_those_of_transformers(
  variant, base_params, tokens, tmp_path
):
  params = base_params(variant)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  pretrained.save(tmp_path, variant, half, dtype=jnp.bfloat16)
  expected = call(hugging_face(tmp_path), tokens).detach().numpy()
  model = gpt2.GPT2(variant, dtype=jnp.bfloat16)
  got = jax.jit(model.apply)({"params": half}, tokens)
  assert got.dtype == jnp.float32
  error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
  assert error < 0.02


def gradients_of_peft(model):
  """By the names in an adapter's file, which are without the adapter's."""
  return {
    name.replace(".default", "").replace("modules_to_save.", ""): x.grad.numpy()
    for name, x in model.named_parameters()
    if x.grad is not None
  }


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Of peft.
@pytest.mark.oracle
def test_lora_gradients_equal_peft(
  variant, base_params, lora_factors, tokens, mask, tmp_path
):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  model = gpt2.GPT2(variant, ALL)
  params, factors = base_params(variant), lora_factors(model)
  loss, got = jax.jit(gradient(model, tokens, mask))(factors, params)
  names = {"config": variant, "base_model": "tiny"}
  pretrained.save(tmp_path, variant, params, dtype=jnp.float32)
  adapters.save(tmp_path / "adapter", factors, ALL, **names)
  adapters.save(tmp_path / "gradient", got, ALL, **names)
  reference = hugging_face(tmp_path, tmp_path / "adapter")
  logits = call(reference, tokens, mask)[:, :-1]
  real = torch.tensor(mask[:, 1:] * mask[:, :-1]).bool()
  targets = torch.tensor(tokens[:, 1:], dtype=torch.long)
  expected = torch.nn.functional.cross_entropy(logits[real], targets[real])
  expected.backward()
  assert abs(loss - expected.item()) < 1e-4
  compare_gradients(tmp_path / "gradient", reference)


def compare_gradients(folder, reference):
  got = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
  expected = gradients_of_peft(reference)
  assert got.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(got[name], x, atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Of peft.
@pytest.mark.oracle
def test_scores_and_gradients_with_a_head_equal_peft(
  config, base_params, lora_factors, tokens, mask, tmp_path
):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  model = gpt2.GPT2(config, ALL, LABELS)
  params, factors = base_params(config, LABELS), lora_factors(model)
  labels = np.array([4, 0, 2])

  def loss(factors):
    variables = {"params": params, "lora": factors}
    scores = model.apply(variables, tokens, mask)
    losses = language.token_losses(
      scores[:, None], jnp.asarray(labels)[:, None]
    )
    return losses.mean(), scores

  got, scores = jax.jit(jax.grad(loss, has_aux=True))(factors)
  names = {"config": config, "base_model": "tiny", "head": LABELS}
  pretrained.save(tmp_path, config, params, head=LABELS, dtype=jnp.float32)
  adapters.save(tmp_path / "adapter", factors, ALL, **names)
  adapters.save(tmp_path / "gradient", got, ALL, **names)
  reference = hugging_face(tmp_path, tmp_path / "adapter", LABELS)
  expected = call(reference, tokens, mask)
  np.testing.assert_allclose(scores, expected.detach(), atol=1e-4, rtol=0)
  torch.nn.functional.cross_entropy(expected, torch.tensor(labels)).backward()
  compare_gradients(tmp_path / "gradient", reference)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Of peft.
@pytest.mark.oracle
def test_an_adapter_of_peft_with_a_head_is_read(
  config, base_params, tokens, mask, tmp_path
):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  peft = pytest.importorskip("peft")
  params = base_params(config, LABELS)
  pretrained.save(tmp_path, config, params, head=LABELS, dtype=jnp.float32)
  settings = peft.LoraConfig(
    r=2,
    lora_alpha=8,
    target_modules=["c_attn", "mlp.c_proj"],
    task_type="SEQ_CLS",
    fan_in_fan_out=True,
  )
  reference = peft.get_peft_model(hugging_face(tmp_path, head=LABELS), settings)
  reference.eval()
  generator = torch.Generator().manual_seed(0)
  for x in reference.parameters():
    if x.requires_grad:
      x.data = 0.3 * torch.randn(x.shape, generator=generator)
  reference.save_pretrained(tmp_path / "adapter")
  expected = call(reference, tokens, mask).detach().numpy()
  settings, factors = adapters.load(tmp_path / "adapter", config)
  assert settings.targets == ("c_attn", "mlp.c_proj")
  model = gpt2.GPT2(config, settings, LABELS)
  lora.check(model, factors)
  got = jax.jit(model.apply)({"params": params, "lora": factors}, tokens, mask)
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.oracle
def test_transformers_loads_a_merged_classifier(
  config, base_params, lora_factors, tokens, mask, tmp_path
):
  model = gpt2.GPT2(config, ALL, LABELS)
  params, factors = base_params(config), lora_factors(model)
  variables = {"params": params, "lora": factors}
  got = jax.jit(model.apply)(variables, tokens, mask)
  merged = lora.merge(params, factors, ALL.scale)
  pretrained.save(tmp_path, config, merged, head=LABELS, dtype=jnp.float32)
  reference = hugging_face(tmp_path, head=LABELS)
  expected = call(reference, tokens, mask).detach().numpy()
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
