import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm.models import (
  adapters,
  decoder,
  heads,
  language,
  lora,
  pretrained,
)

ALL = lora.LoRA(rank=3, alpha=6.0, targets=decoder.LINEAR)


def np_norm(x, scale, config):
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)
  return x * (1 + scale if config.unit_offset else scale)


def np_act(x, kind):
  if kind == "silu":
    return x / (1 + np.exp(-x))
  if kind == "gelu":
    return x * np.vectorize(lambda x: math.erf(x / math.sqrt(2)) + 1)(x) / 2
  return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def np_rotate(x, position, frequencies, magnitude):
  """Turns each pair (i, i + half) of `x` [head_dim] as a complex number."""
  half = len(x) // 2
  turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies)
  return magnitude * np.concatenate([turned.real, turned.imag])


def np_dense(x, params, factors, scale):
  y = x @ params["kernel"] + params.get("bias", 0)
  return y + scale * x @ factors["a"] @ factors["b"] if factors else y


def np_attention(x, params, factors, config, scale, windowed, seen, positions):
  dense = lambda name, x: np_dense(
    x, params[name], factors.get(name), scale
  ).reshape(len(x), -1, config.head_dim)
  query, key, value = (dense(f"{name}_proj", x) for name in "qkv")
  if config.qk_norm:
    query = np_norm(query, params["q_norm"]["scale"], config)
    key = np_norm(key, params["k_norm"]["scale"], config)
  group = config.num_attention_heads // config.num_key_value_heads
  rope = (windowed and config.local_rope) or config.rope
  # Their formulas are held to account in rotary_test.
  turn = rope.frequencies(config.head_dim), rope.magnitude
  window = config.sliding_window if windowed else len(x)
  width = config.query_pre_attn_scalar or config.head_dim
  out = np.zeros_like(query)
  for head in range(config.num_attention_heads):
    for t in range(len(x)):
      q = np_rotate(query[t, head], positions[t], *turn)
      keys = [s for s in range(t + 1) if seen(t, s) and t - s < window]
      scores = np.array(
        [
          q @ np_rotate(key[s, head // group], positions[s], *turn)
          for s in keys
        ]
      ) / math.sqrt(width)
      if cap := config.attention_softcap:
        scores = cap * np.tanh(scores / cap)
      weights = np.exp(scores)
      out[t, head] = weights / weights.sum() @ value[keys, head // group]
  out = out.reshape(len(x), -1)
  return np_dense(out, params["o_proj"], factors.get("o_proj"), scale)


def np_decoder(config, params, factors, row, scale=0.0, segments=None):
  """Logits of one row, in float64 and with plain loops."""
  params, factors = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (params, factors)
  )
  segments = np.ones_like(row) if segments is None else segments
  seen = lambda t, s: segments[t] == segments[s]
  positions = [
    t
    - min(s for s in range(t + 1) if (segments[s : t + 1] == segments[t]).all())
    for t in range(len(row))
  ]
  x = params["embed_tokens"]["embedding"][row]
  if config.scaled_embeddings:
    x = x * math.sqrt(config.hidden_size)
  for i in range(config.num_hidden_layers):
    layer, low = jax.tree.map(
      lambda x, i=i: x[i], (params["layers"], factors.get("layers", {}))
    )
    norm = lambda name, x, layer=layer: np_norm(
      x, layer[f"{name}_layernorm"]["scale"], config
    )
    y = np_attention(
      norm("input", x),
      layer["self_attn"],
      low.get("self_attn", {}),
      config,
      scale,
      bool(config.windowed) and config.windowed[i],
      seen,
      positions,
    )
    x = x + (norm("post_attention", y) if config.sandwich_norms else y)
    before = "pre_feedforward" if config.sandwich_norms else "post_attention"
    z = norm(before, x)
    mlp, low = layer["mlp"], low.get("mlp", {})
    dense = lambda name, z, mlp=mlp, low=low: np_dense(
      z, mlp[name], low.get(name), scale
    )
    z = np_act(dense("gate_proj", z), config.hidden_act) * dense("up_proj", z)
    z = dense("down_proj", z)
    x = x + (norm("post_feedforward", z) if config.sandwich_norms else z)
  x = np_norm(x, params["norm"]["scale"], config)
  if config.tie_word_embeddings:
    logits = x @ params["embed_tokens"]["embedding"].T
  else:
    logits = x @ params["lm_head"]["kernel"]
  cap = config.final_softcap
  return cap * np.tanh(logits / cap) if cap else logits


def test_logits_match_numpy(variant, base_params, tokens):
  params = base_params(variant)
  logits = jax.jit(decoder.Decoder(variant).apply)({"params": params}, tokens)
  for row, got in zip(tokens, logits, strict=True):
    expected = np_decoder(variant, params, {}, row)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_logits_with_lora_match_numpy(
  config, base_params, lora_factors, tokens
):
  model = decoder.Decoder(config, ALL)
  params, factors = base_params(config), lora_factors(model)
  logits = jax.jit(model.apply)({"params": params, "lora": factors}, tokens)
  expected = np_decoder(config, params, factors, tokens[0], scale=2.0)
  np.testing.assert_allclose(logits[0], expected, atol=2e-4)


SEGMENTS = {
  "padding on the left": [0] * 4 + [1] * 13,
  "padding on the right": [1] * 12 + [0] * 5,
  "three documents": [1] * 6 + [2] * 4 + [3] * 5 + [0] * 2,
}


@pytest.mark.parametrize("kind", SEGMENTS)
def test_documents_of_a_row_are_apart(variant, base_params, tokens, kind):
  params, segments = base_params(variant), np.array(SEGMENTS[kind])
  apply = jax.jit(decoder.Decoder(variant).apply)
  logits = apply({"params": params}, tokens[:1], segments[None])[0]
  expected = np_decoder(variant, params, {}, tokens[0], segments=segments)
  real = segments > 0
  np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)


def test_a_cache_changes_nothing(variant, base_params, tokens):
  model, params = decoder.Decoder(variant), base_params(variant)
  apply = jax.jit(model.apply)
  segments = np.ones_like(tokens)
  segments[1, :3] = 0  # Padding on the left, as of a shorter prompt.
  whole = apply({"params": params}, tokens, segments)
  cache = model.empty_cache(len(tokens), tokens.shape[1] + 3)
  parts = []
  for part in (slice(0, 9), slice(9, 10), slice(10, 17)):
    variables = {"params": params}
    rows, belong = tokens[:, part], segments[:, part]
    logits, cache = apply(variables, rows, belong, cache=cache)
    parts.append(logits)
  got = np.concatenate(parts, axis=1)
  np.testing.assert_allclose(got[segments > 0], whole[segments > 0], atol=1e-4)
  assert cache.used == tokens.shape[1]


def test_later_tokens_do_not_change_earlier_logits(config, base_params, tokens):
  apply = jax.jit(decoder.Decoder(config).apply)
  variables = {"params": base_params(config)}
  changed = tokens.copy()
  changed[:, 9:] = 0
  before, after = apply(variables, tokens), apply(variables, changed)
  np.testing.assert_array_equal(before[:, :9], after[:, :9])
  assert not np.allclose(before[:, 9:], after[:, 9:])


def test_a_target_that_is_no_layer_is_refused(config):
  with pytest.raises(ValueError, match="c_attn.*q_proj"):
    decoder.Decoder(config, lora.LoRA(targets=("q_proj", "c_attn")))


def test_a_pooling_that_transformers_lacks_is_not_written(config):
  with pytest.raises(ValueError, match="'last' or 'mean' .* got 'first'"):
    decoder.Decoder(config, head=heads.Classifier(2, "first"))
  assert decoder.Decoder(config, head=heads.Classifier(2, "mean"))
  with pytest.raises(ValueError, match="expected pooling 'last' .* 'mean'"):
    config.to_hugging_face(heads.Classifier(2, "mean"))


def gradient(model, tokens):
  def loss(factors, params):
    variables = {"params": params, "lora": factors}
    logits = model.apply(variables, tokens[:, :-1])
    return language.token_losses(logits, jnp.asarray(tokens[:, 1:])).mean()

  return jax.value_and_grad(loss)


def test_programs_do_not_grow_with_depth(
  config, base_params, lora_factors, tokens, equations
):
  def size(layers):
    shape = dataclasses.replace(config, num_hidden_layers=layers)
    model = decoder.Decoder(shape, ALL)
    factors, params = lora_factors(model), base_params(shape)
    return len(equations(gradient(model, tokens), factors, params))

  assert size(2) == size(8)


def test_rematerialisation_changes_memory_and_not_gradients(
  config, base_params, lora_factors, tokens
):
  shape = dataclasses.replace(config, num_hidden_layers=8)
  params, results, memory = base_params(shape), [], []
  for remat in (False, True):
    model = decoder.Decoder(shape, ALL, remat=remat)
    factors = lora_factors(model)
    program = jax.jit(gradient(model, tokens)).lower(factors, params).compile()
    memory.append(program.memory_analysis().temp_size_in_bytes)
    results.append(program(factors, params))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    *results,
  )
  assert memory[1] < memory[0] / 2


def test_bfloat16_is_close_to_float32(
  config, base_params, lora_factors, tokens
):
  params = base_params(config)
  (loss, expected), (rounded, got) = (
    jax.jit(gradient(model, tokens))(lora_factors(model), params)
    for model in (
      decoder.Decoder(config, ALL),
      decoder.Decoder(config, ALL, dtype=jnp.bfloat16),
    )
  )
  # bfloat16 keeps eight bits: errors of a percent or so.
  np.testing.assert_allclose(rounded, loss, rtol=0.02)
  for x, y in zip(*map(jax.tree.leaves, (expected, got)), strict=True):
    assert y.dtype == jnp.float32
    assert jnp.linalg.norm(x - y) < 0.1 * jnp.linalg.norm(x)


def test_logits_are_float32_in_bfloat16_too(config, base_params, tokens):
  model = decoder.Decoder(config, dtype=jnp.bfloat16)
  variables = {"params": base_params(config)}
  logits = jax.eval_shape(model.apply, variables, tokens)
  assert logits.dtype == jnp.float32


def kernel_shapes(params):
  flat = jax.tree.leaves_with_path(params["layers"])
  return {x.shape[1:] for path, x in flat if path[-1].key == "kernel"}


def products(all_equations):
  return [x for x in all_equations if x.primitive.name == "dot_general"]


def test_no_gradient_of_a_base_weight_is_computed(
  config, base_params, lora_factors, tokens, equations
):
  model = decoder.Decoder(config, ALL)
  factors, params = lora_factors(model), base_params(config)
  shapes = kernel_shapes(params)
  shapes |= {shape[::-1] for shape in shapes}

  def base_gradients(fn):
    dots = products(equations(fn, factors, params))
    return [x for x in dots if x.outvars[0].aval.shape in shapes]

  assert not base_gradients(gradient(model, tokens))
  loss = lambda *args: gradient(model, tokens)(*args)[0]
  both = base_gradients(jax.grad(loss, argnums=(0, 1)))
  assert len(both) >= len(decoder.LINEAR)


def test_the_backward_pass_costs_no_base_gradients(
  config, base_params, lora_factors, tokens
):
  # Rank 1 in wide layers, so that the base model is nearly all of the work:
  # forward 1, gradient of the activations 1, gradient of the weights 1.
  shape = dataclasses.replace(config, hidden_size=96, intermediate_size=384)
  model = decoder.Decoder(shape, dataclasses.replace(ALL, rank=1))
  factors, params = lora_factors(model), base_params(shape)
  value_and_grad = gradient(model, tokens)
  loss = lambda *args: value_and_grad(*args)[0]

  def flops(fn):
    return jax.jit(fn).lower(factors, params).cost_analysis()["flops"]

  assert flops(value_and_grad) < 2.4 * flops(loss)
  assert flops(jax.grad(loss, argnums=(0, 1))) > 2.7 * flops(loss)


def test_base_products_have_no_client_dimension(
  config, base_params, lora_factors, tokens, equations
):
  clients = 5
  model = decoder.Decoder(config, ALL)
  params = base_params(config)
  factors = jax.tree.map(
    lambda x: jnp.stack([x] * clients), lora_factors(model)
  )
  rows = jnp.stack([jnp.asarray(tokens)] * clients)
  one = lambda factors, params, rows: gradient(model, rows)(factors, params)
  everyone = jax.vmap(one, in_axes=(0, None, 0))
  found = equations(everyone, factors, params, rows)
  shapes = kernel_shapes(params)
  base = [
    x
    for x in products(found)
    if any(operand.aval.shape in shapes for operand in x.invars)
  ]
  # Forward, and backward to the activations (of the first layer's too).
  assert len(base) >= 2 * len(decoder.LINEAR)
  for product in base:
    assert product.params["dimension_numbers"][1] == ((), ())
  batched = {(clients, *shape) for shape in shapes}
  everything = [v.aval.shape for x in found for v in x.outvars]
  assert not batched & set(everything)


def test_vmapped_clients_equal_a_loop(
  config, base_params, lora_factors, tokens
):
  model = decoder.Decoder(config, dataclasses.replace(ALL, dropout=0.3))
  params, factors = base_params(config), lora_factors(model)
  keys = jax.random.split(jax.random.key(3), 3)

  def apply(key):
    return model.apply(
      {"params": params, "lora": factors},
      tokens,
      deterministic=False,
      rngs={"dropout": key},
    )

  together = jax.jit(jax.vmap(apply))(keys)
  alone = jnp.stack([jax.jit(apply)(key) for key in keys])
  np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
  # Same rows, same factors: only the masks differ.
  assert jnp.abs(together[0] - together[1]).max() > 0.01


def test_dropout_is_off_when_deterministic(
  config, base_params, lora_factors, tokens
):
  model = decoder.Decoder(config, dataclasses.replace(ALL, dropout=0.3))
  variables = {"params": base_params(config), "lora": lora_factors(model)}
  np.testing.assert_array_equal(
    jax.jit(model.apply)(variables, tokens),
    jax.jit(decoder.Decoder(config, ALL).apply)(variables, tokens),
  )


def hugging_face(folder):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  transformers = pytest.importorskip("transformers")
  torch.set_num_threads(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()

  def logits(tokens, mask=None):
    tokens = torch.tensor(np.asarray(tokens), dtype=torch.long)
    mask = None if mask is None else torch.tensor(mask, dtype=torch.long)
    with torch.no_grad():
      return model(tokens, attention_mask=mask).logits

  return logits


@pytest.mark.oracle
def test_logits_equal_transformers(variant, base_params, tokens, tmp_path):
  params = base_params(variant)
  pretrained.save(tmp_path, variant, params, dtype=jnp.float32)
  reference = hugging_face(tmp_path)
  mask = np.ones_like(tokens)
  mask[1, :4] = mask[2, 11:] = 0  # Padding on the left, and on the right.
  apply = jax.jit(decoder.Decoder(variant).apply)
  for given in (None, mask):
    expected = reference(tokens, given).numpy()
    got = apply({"params": params}, tokens, given)
    real = np.ones_like(mask) > 0 if given is None else mask > 0
    np.testing.assert_allclose(got[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Of peft.
def test_gradients_of_the_factors_equal_peft(
  variant, base_params, lora_factors, tokens, tmp_path
):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  peft = pytest.importorskip("peft", reason="oracle needs peft")
  transformers = pytest.importorskip("transformers")
  params, model = base_params(variant), decoder.Decoder(variant, ALL)
  factors = lora_factors(model)
  base, adapter = tmp_path / "base", tmp_path / "adapter"
  pretrained.save(base, variant, params, dtype=jnp.float32)
  adapters.save(adapter, factors, ALL, config=variant, base_model=str(base))
  reference = peft.PeftModel.from_pretrained(
    transformers.AutoModelForCausalLM.from_pretrained(
      base, dtype=torch.float32, attn_implementation="eager"
    ),
    adapter,
    is_trainable=True,
  )
  mask = np.ones_like(tokens)
  mask[1, :4] = mask[2, 11:] = 0
  weights = np.random.default_rng(1).normal(size=(*tokens.shape, 96))
  weights = weights.astype(np.float32) * mask[..., None]
  logits = reference(
    torch.tensor(tokens, dtype=torch.long),
    attention_mask=torch.tensor(mask, dtype=torch.long),
  ).logits
  (logits * torch.tensor(weights)).mean().backward()
  gradients = {
    name.replace(".default", ""): x.grad.numpy()
    for name, x in reference.named_parameters()
    if x.requires_grad
  }

  def loss(factors):
    variables = {"params": params, "lora": factors}
    return (model.apply(variables, tokens, mask) * weights).mean()

  ours = tmp_path / "gradients"
  adapters.save(
    ours,
    jax.jit(jax.grad(loss))(factors),
    ALL,
    config=variant,
    base_model=str(base),
  )
  got = safetensors.numpy.load_file(ours / "adapter_model.safetensors")
  assert set(got) == set(gradients)
  for name, gradient in gradients.items():
    np.testing.assert_allclose(got[name], gradient, atol=1e-4, rtol=0)
    assert np.abs(gradient).max() > 0


@pytest.mark.oracle
def test_bfloat16_logits_are_near_those_of_transformers(
  variant, base_params, tokens, tmp_path
):
  params = base_params(variant)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  pretrained.save(tmp_path, variant, half, dtype=jnp.bfloat16)
  expected = hugging_face(tmp_path)(tokens).numpy()  # In float32.
  model = decoder.Decoder(variant, dtype=jnp.bfloat16)
  got = jax.jit(model.apply)({"params": half}, tokens)
  error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
  assert error < 0.02


@pytest.fixture(scope="module")
def stories(data):
  folder = data / "stories260k"
  config, params = pretrained.load(folder)
  apply = jax.jit(decoder.Decoder(config).apply)
  return folder, lambda tokens: apply({"params": params}, tokens)


@pytest.fixture(scope="module")
def sample_rows(data, stories):
  """Some of the text that the model was trained on, [8, 129]."""
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.AutoTokenizer.from_pretrained(stories[0])
  path = data / "tinystories_sample" / "tinystories_train_head.txt"
  ids = tokenizer(path.read_text(encoding="utf-8")[:8000])["input_ids"]
  return np.array(ids[: 8 * 129], np.int32).reshape(8, 129)


@pytest.mark.oracle
def test_stories260k_logits_equal_transformers(stories, sample_rows):
  folder, logits = stories
  expected = hugging_face(folder)(sample_rows).numpy()
  assert np.abs(logits(sample_rows) - expected).max() <= 1e-4


@pytest.mark.oracle
def test_stories260k_loss_equals_transformers(stories, sample_rows):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  folder, logits = stories
  inputs, targets = sample_rows[:, :-1], sample_rows[:, 1:]
  loss = language.token_losses(logits(inputs), jnp.asarray(targets)).mean()
  expected = torch.nn.functional.cross_entropy(
    hugging_face(folder)(inputs).flatten(0, 1),
    torch.tensor(targets.flatten(), dtype=torch.long),
  )
  assert abs(loss - expected.item()) <= 1e-4
  assert loss < 2.5  # Rows start anywhere; a random model has 6.2.
