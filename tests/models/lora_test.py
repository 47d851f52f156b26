import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import decoder, language, lora, pretrained, quantized

ALL = lora.LoRA(rank=3, alpha=6.0, targets=decoder.LINEAR)


@pytest.mark.parametrize(
  "change, named",
  [
    ({"rank": 0}, "rank >= 1, got 0"),
    ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, "got -0.1"),
    ({"targets": ()}, r"at least one layer, got \(\)"),
    ({"targets": "q_proj"}, "got 'q_proj'. Give a tuple"),
  ],
)
def test_bad_settings_are_refused(change, named):
  with pytest.raises(ValueError, match=named):
    lora.LoRA(**change)


def test_settings_can_be_hashed_whatever_sequence_names_the_targets():
  settings = lora.LoRA(targets=["q_proj", "v_proj"])
  assert hash(settings) == hash(lora.LoRA())


def test_only_the_targets_have_factors(config):
  settings = dataclasses.replace(ALL, targets=("v_proj", "down_proj"))
  factors = lora.init(decoder.Decoder(config, settings), jax.random.key(0))
  assert jax.tree.map(jnp.shape, factors) == {
    "layers": {
      "self_attn": {"v_proj": {"a": (2, 24, 3), "b": (2, 3, 12)}},
      "mlp": {"down_proj": {"a": (2, 40, 3), "b": (2, 3, 24)}},
    }
  }


@pytest.mark.parametrize("by", ["lora.init", "model.init"])
def test_a_starts_uniform_and_b_at_zero(config, by):
  model = decoder.Decoder(config, dataclasses.replace(ALL, rank=64))
  key = jax.random.key(0)
  if by == "lora.init":
    factors = lora.init(model, key)
  else:
    tokens = jnp.zeros((1, 1), jnp.int32)
    factors = jax.jit(model.init)(key, tokens)["lora"]
  for path, factor in jax.tree.leaves_with_path(factors):
    if path[-1].key == "b":
      assert not factor.any()
      continue
    _, inputs, _ = factor.shape
    bound = 1 / math.sqrt(inputs)
    assert factor.dtype == jnp.float32
    assert jnp.abs(factor).max() <= bound
    assert jnp.abs(factor).max() > 0.98 * bound
    # A uniform's deviation is bound / sqrt(3), here of 3072 numbers or more.
    assert factor.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(factor.mean()) < 0.05 * bound
    assert not np.array_equal(factor[0], factor[1])


def test_factors_depend_on_the_key_and_on_no_other_target(config):
  draw = lambda seed, targets: lora.init(
    decoder.Decoder(config, dataclasses.replace(ALL, targets=targets)),
    jax.random.key(seed),
  )["layers"]["self_attn"]["q_proj"]["a"]
  np.testing.assert_array_equal(draw(0, decoder.LINEAR), draw(0, ("q_proj",)))
  assert not np.array_equal(draw(0, ("q_proj",)), draw(1, ("q_proj",)))


def test_factors_of_equal_shape_differ(config):
  factors = lora.init(decoder.Decoder(config, ALL), jax.random.key(0))
  mlp = factors["layers"]["mlp"]
  assert not np.array_equal(mlp["gate_proj"]["a"], mlp["up_proj"]["a"])


def test_a_new_adapter_changes_nothing(config, base_params, tokens):
  params, model = base_params(config), decoder.Decoder(config, ALL)
  factors = lora.init(model, jax.random.key(0))
  np.testing.assert_array_equal(
    jax.jit(model.apply)({"params": params, "lora": factors}, tokens),
    jax.jit(decoder.Decoder(config).apply)({"params": params}, tokens),
  )


def test_a_model_without_an_adapter_has_no_factors(config):
  with pytest.raises(ValueError, match="adapter"):
    lora.init(decoder.Decoder(config), jax.random.key(0))


def dense(rank, dropout, x, key):
  """`scale * dropout(x)`: a base kernel of zeros and factors of ones."""
  settings = lora.LoRA(rank, 2.0 * rank, dropout, ("layer",))
  width = x.shape[-1]
  layer = lora.Dense(width, settings, name="layer")
  variables = {
    "params": {"kernel": jnp.zeros((width, width))},
    "lora": {"a": jnp.eye(width, rank), "b": jnp.eye(rank, width)},
  }
  return layer.apply(variables, x, deterministic=False, rngs={"dropout": key})


def test_the_scale_is_alpha_over_rank():
  x = jnp.ones((2, 3, 4))
  y = dense(4, 0.0, x, jax.random.key(0))
  np.testing.assert_array_equal(y, 2 * x)


def test_dropout_acts_on_the_input_of_a_and_keeps_its_mean():
  x = jnp.ones((50, 20, 4))
  y = dense(4, 0.25, x, jax.random.key(0))
  kept = np.asarray(y) != 0
  np.testing.assert_allclose(y[kept], 2 / 0.75, rtol=1e-6)
  # 4000 draws: the deviation of their mean is 0.007.
  assert kept.mean() == pytest.approx(0.75, abs=0.03)


def test_dropout_leaves_the_base_product_alone():
  settings = lora.LoRA(2, dropout=0.9, targets=("layer",))
  layer = lora.Dense(5, settings, use_bias=True, name="layer")
  x = jax.random.normal(jax.random.key(0), (7, 3))
  kernel, bias = jnp.ones((3, 5)), jnp.arange(5.0)
  factors = {"a": jnp.ones((3, 2)), "b": jnp.zeros((2, 5))}
  y = layer.apply(
    {"params": {"kernel": kernel, "bias": bias}, "lora": factors},
    x,
    deterministic=False,
    rngs={"dropout": jax.random.key(1)},
  )
  np.testing.assert_allclose(y, x @ kernel + bias[None], rtol=1e-6)


def test_layers_have_masks_of_their_own(config, base_params, draw):
  settings = dataclasses.replace(ALL, targets=("down_proj",), dropout=0.5)
  model = decoder.Decoder(config, settings)
  params = base_params(config)
  factors = draw(lora.init(model, jax.random.key(0)))

  def loss(factors):
    logits = model.apply(
      {"params": params, "lora": factors},
      jnp.zeros((1, 4), jnp.int32),
      deterministic=False,
      rngs={"dropout": jax.random.key(1)},
    )
    return (logits**2).mean()

  # A row of the gradient of `a` is zero where its input is dropped everywhere.
  gradient = jax.jit(jax.grad(loss))(factors)["layers"]["mlp"]["down_proj"]["a"]
  dropped = np.asarray((gradient == 0).all(-1))
  assert dropped.any(1).all()
  assert not np.array_equal(dropped[0], dropped[1])


def test_merged_weights_compute_the_same(
  config, base_params, lora_factors, tokens
):
  model = decoder.Decoder(config, ALL)
  params, factors = base_params(config), lora_factors(model)
  merged = lora.merge(params, factors, ALL.scale)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  np.testing.assert_allclose(
    jax.jit(decoder.Decoder(config).apply)({"params": merged}, tokens),
    jax.jit(model.apply)({"params": params, "lora": factors}, tokens),
    atol=1e-4,
  )


def test_merging_keeps_the_type_and_what_has_no_factors(config, base_params):
  settings = dataclasses.replace(ALL, targets=("q_proj",))
  factors = lora.init(decoder.Decoder(config, settings), jax.random.key(0))
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base_params(config))
  merged = lora.merge(params, jax.tree.map(jnp.ones_like, factors), 1.0)
  assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
  changed = jax.tree.map(lambda x, y: bool((x != y).any()), params, merged)
  names = [path for path, x in jax.tree.leaves_with_path(changed) if x]
  assert [path[-2].key for path in names] == ["q_proj"]


def test_adding_the_products_is_merging_the_factors(
  config, base_params, lora_factors
):
  params = base_params(config)
  factors = lora_factors(decoder.Decoder(config, ALL))
  is_pair = lambda x: "a" in x
  residual = jax.tree.map(
    lambda x: {"delta": 2.0 * x["a"] @ x["b"]}, factors, is_leaf=is_pair
  )
  for dtype in (jnp.float32, jnp.bfloat16):
    base = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
    jax.tree.map(
      np.testing.assert_array_equal,
      lora.add(base, residual),
      lora.merge(base, factors, 2.0),
    )


def test_adding_to_a_quantised_kernel_makes_it_dense():
  kernel = jax.random.normal(jax.random.key(0), (6, 4))
  params = {"up_proj": {"kernel": quantized.quantize(kernel, "int8")}}
  residual = {"up_proj": {"delta": jnp.ones((6, 4))}}
  got = lora.add(params, residual)["up_proj"]["kernel"]
  dense = quantized.dequantize(params["up_proj"]["kernel"], jnp.float32)
  np.testing.assert_array_equal(got, dense + 1)


def test_factors_that_fit_pass(config):
  model = decoder.Decoder(config, ALL)
  lora.check(model, lora.init(model, jax.random.key(0)))


def test_factors_that_do_not_fit_are_listed(config):
  model = decoder.Decoder(config, dataclasses.replace(ALL, targets=("q_proj",)))
  other = decoder.Decoder(
    dataclasses.replace(config, num_hidden_layers=3),
    dataclasses.replace(ALL, rank=5, targets=("q_proj", "up_proj")),
  )
  factors = lora.init(other, jax.random.key(0))
  with pytest.raises(ValueError) as error:
    lora.check(model, factors)
  message = str(error.value)
  assert "self_attn/q_proj/a: expected (2, 24, 3), got (3, 24, 5)" in message
  assert "mlp/up_proj/b: expected no factor, got (3, 5, 40)" in message
  with pytest.raises(ValueError, match="q_proj/b: .* got none"):
    del factors["layers"]["self_attn"]["q_proj"]["b"]
    lora.check(model, factors)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Of peft.
def test_forward_and_gradients_equal_peft(
  config, base_params, lora_factors, tokens, tmp_path
):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  peft = pytest.importorskip("peft", reason="oracle needs peft")
  transformers = pytest.importorskip("transformers")
  params, model = base_params(config), decoder.Decoder(config, ALL)
  factors = lora_factors(model)
  pretrained.save(tmp_path, config, params, dtype=jnp.float32)
  reference = peft.get_peft_model(
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
    peft.LoraConfig(
      r=3,
      lora_alpha=6,
      target_modules=list(decoder.LINEAR),
      task_type="CAUSAL_LM",
    ),
  )
  theirs = {}  # Path and layer of each of PEFT's factors.
  for name, weight in reference.named_parameters():
    if not weight.requires_grad:
      continue
    parts = name.split(".")
    layer, group, module = int(parts[4]), *parts[5:7]
    theirs[group, module, parts[7][-1].lower(), layer] = weight
    ours = factors["layers"][group][module][parts[7][-1].lower()][layer]
    with torch.no_grad():
      weight.copy_(torch.tensor(np.asarray(ours).T))
  assert len(theirs) == 2 * 2 * len(decoder.LINEAR)

  row = torch.tensor(tokens, dtype=torch.long)
  logits = reference(row[:, :-1]).logits
  loss = torch.nn.functional.cross_entropy(
    logits.flatten(0, 1), row[:, 1:].flatten()
  )
  loss.backward()

  @jax.jit
  def our_loss(factors):
    variables = {"params": params, "lora": factors}
    logits = model.apply(variables, tokens[:, :-1])
    losses = language.token_losses(logits, jnp.asarray(tokens[:, 1:]))
    return losses.mean(), logits

  gradient, got = jax.grad(our_loss, has_aux=True)(factors)
  np.testing.assert_allclose(got, logits.detach().numpy(), atol=1e-4, rtol=0)
  for (group, module, factor, layer), weight in theirs.items():
    np.testing.assert_allclose(
      gradient["layers"][group][module][factor][layer].T,
      weight.grad.numpy(),
      atol=1e-4,
      rtol=0,
    )
