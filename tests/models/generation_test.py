from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import (
  attention,
  families,
  generation,
  gpt2,
  heads,
  lora,
  pretrained,
)

SHAPE = {
  "vocab_size": 96,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 6,
  "max_position_embeddings": 64,
}
FULL, WINDOW = "full_attention", "sliding_attention"
# Untied, since large random ones that are tied repeat a token for ever.
MODELS = {
  "gpt2": {
    "vocab_size": 96,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "tie_word_embeddings": False,
  },
  "mistral": {**SHAPE, "sliding_window": 5},
  "qwen3": SHAPE,
  "gemma3_text": {
    **SHAPE,
    "sliding_window": 4,
    "query_pre_attn_scalar": 6,
    "tie_word_embeddings": False,
    "layer_types": [WINDOW, FULL, WINDOW],
    "rope_parameters": {
      FULL: {"rope_theta": 1000.0, "rope_type": "default"},
      WINDOW: {"rope_theta": 10.0, "rope_type": "default"},
    },
  },
}
PROMPTS = [[7, 3, 9], [11, 4, 4, 80, 2, 31, 5, 5, 17, 60, 23], [42]]


@pytest.fixture(params=MODELS)
def config(request):
  fields = {"model_type": request.param, **MODELS[request.param]}
  return families.from_hugging_face(fields)


@pytest.fixture
def gpt2_config():
  return families.from_hugging_face({"model_type": "gpt2", **MODELS["gpt2"]})


@pytest.fixture
def base_params(draw):
  """Large random parameters, so that text does not soon repeat itself."""

  def make(config):
    shapes = lora.abstract_variables(families.model(config))["params"]
    around_one = lambda path, x: x + (path[-1].key == "scale")
    return jax.tree.map_with_path(around_one, draw(shapes, scale=0.5))

  return make


def plain(apply, prompt, count):
  """The most likely tokens, each from all that is before it."""
  row = list(prompt)
  for _ in range(count):
    padded = np.array([row + [0] * (64 - len(row))])  # One program for all.
    row.append(int(apply(padded)[0, len(row) - 1].argmax()))
  return row[len(prompt) :]


def test_the_cache_does_not_change_greedy_text(
  config, base_params, lora_factors
):
  targets = ("c_attn",) if config.model_type == "gpt2" else ("q_proj", "v_proj")
  model = families.model(config, lora.LoRA(rank=2, targets=targets))
  params, factors = base_params(config), lora_factors(model)
  got = generation.generate(model, params, factors, PROMPTS, max_new_tokens=20)
  variables = {"params": params, "lora": factors}
  apply = jax.jit(lambda rows: model.apply(variables, rows))
  for prompt, row in zip(PROMPTS, got, strict=True):
    assert row == plain(apply, prompt, 20)
  assert len({tuple(row) for row in got}) == 3
  without = families.model(config)
  base = generation.generate(without, params, None, PROMPTS, max_new_tokens=20)
  assert base != got


def hugging_face(folder, prompts, count, eos_ids=()):
  """What transformers' greedy search continues `prompts` with."""
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  transformers = pytest.importorskip("transformers")
  torch.set_num_threads(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  time = max(map(len, prompts))
  pad = lambda row, value: [value] * (time - len(row)) + row
  new = model.generate(
    torch.tensor([pad(row, 0) for row in prompts]),
    attention_mask=torch.tensor([pad([1] * len(x), 0) for x in prompts]),
    generation_config=transformers.GenerationConfig(
      do_sample=False,
      max_new_tokens=count,
      eos_token_id=list(eos_ids) or None,
      pad_token_id=0,
    ),
  )
  rows = new[:, time:].tolist()
  ends = [
    next((i for i, x in enumerate(r) if x in eos_ids), None) for r in rows
  ]
  return [
    row if end is None else row[: end + 1]
    for row, end in zip(rows, ends, strict=True)
  ]


@pytest.mark.oracle
def test_stories260k_equals_transformers(data):
  transformers = pytest.importorskip("transformers")
  folder = data / "stories260k"
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  texts = ["Once upon a time", "Lily wanted to play with her dog. She", "The"]
  prompts = tokenizer(texts)["input_ids"]
  config, params = pretrained.load(folder)
  # A full stop ends a row, each at another time.
  eos_ids = tokenizer(" dog.", add_special_tokens=False)["input_ids"][-1:]
  got = generation.generate(
    families.model(config),
    params,
    None,
    prompts,
    max_new_tokens=48,
    eos_ids=eos_ids,
  )
  assert got == hugging_face(folder, prompts, 48, eos_ids)
  assert len({len(row) for row in got}) > 1
  assert all(row[-1] in eos_ids for row in got)


class Stub(nn.Module):
  """Logits that are known: those of `logits`, or of one more than a token."""

  logits: tuple[float, ...] | None = None
  calls: Any = None
  adapter: Any = None
  head: Any = None
  config = gpt2.GPT2Config(vocab_size=10, max_position_embeddings=10**6)

  def empty_cache(self, batch, length):
    return attention.empty_cache((1, batch, length, 1, 1), jnp.float32)

  def __call__(self, tokens, segments=None, *, cache):
    if self.calls is not None:
      jax.debug.callback(self.calls)
    if self.logits is None:
      return 9.0 * jax.nn.one_hot(tokens + 1, 10), cache
    shape = (*tokens.shape, len(self.logits))
    return jnp.broadcast_to(jnp.array([[self.logits]]), shape), cache


def test_a_row_ends_with_its_eos_and_the_loop_with_the_last_row():
  calls = []
  model = Stub(calls=lambda: calls.append(1))
  got = generation.generate(
    model, {}, None, [[2], [1, 4], [6]], max_new_tokens=50, eos_ids=[5, 9]
  )
  assert got == [[3, 4, 5], [5], [7, 8, 9]]
  jax.effects_barrier()
  assert len(calls) == 1 + 3  # The prompts, then the longest row.


def test_text_is_as_long_as_asked_for():
  got = generation.generate(Stub(), {}, None, [[2], [1]], max_new_tokens=4)
  assert got == [[3, 4, 5, 6], [2, 3, 4, 5]]


LOGITS = (1.0, -0.5, 2.0, 0.25, 0.25, -3.0, 1.5, 0.0, -1.0, 0.7)


def softmax(logits):
  weights = np.exp(np.asarray(logits, np.float64))
  return weights / weights.sum()


def nucleus(weights, top_p):
  """Truncates a distribution, token by token from the most likely one."""
  kept, total = np.zeros_like(weights), 0.0
  for token in np.argsort(-weights, kind="stable"):
    kept[token] = weights[token]
    total += weights[token]
    if total >= top_p:
      break
  return kept / total


def check_frequencies(tokens, expected):
  """Each within five standard deviations of a binomial; none that is 0."""
  n = len(tokens)
  got = np.bincount(tokens, minlength=len(expected)) / n
  bound = 5 * np.sqrt(expected * (1 - expected) / n)
  assert (np.abs(got - expected) <= bound).all()


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.8, 0.99, 1.0])
def test_draws_are_from_the_nucleus(top_p):
  keys = jax.random.split(jax.random.key(0), 20_000)
  logits = jnp.array(LOGITS)
  draw = jax.vmap(lambda key: generation.sample(key, logits, top_p))
  check_frequencies(jax.jit(draw)(keys), nucleus(softmax(LOGITS), top_p))


def test_the_nucleus_is_the_smallest_set_that_is_large_enough():
  # Exact in binary: two reach 3/4 and no third is needed, nor one of a tie.
  logits = jnp.log(jnp.array([0.125, 0.25, 0.125, 0.5]))
  keys = jax.random.split(jax.random.key(0), 500)
  for top_p, kept in [(0.5, {3}), (0.75, {1, 3}), (0.8, {0, 1, 3})]:
    draw = jax.vmap(lambda key, p=top_p: generation.sample(key, logits, p))
    assert set(draw(keys).tolist()) == kept


@pytest.mark.parametrize("temperature, top_p", [(0.5, 1.0), (2.0, 0.7)])
def test_temperature_divides_the_logits_before_the_nucleus(temperature, top_p):
  (row,) = generation.generate(
    Stub(LOGITS),
    {},
    None,
    [[1]],
    max_new_tokens=10_000,
    temperature=temperature,
    top_p=top_p,
    key=jax.random.key(1),
  )
  weights = softmax(np.array(LOGITS) / temperature)
  check_frequencies(row, nucleus(weights, top_p))


@pytest.mark.parametrize("temperature, top_p", [(1e-4, 1.0), (5.0, 1e-6)])
def test_low_settings_are_greedy(temperature, top_p):
  got = generation.generate(
    Stub(),
    {},
    None,
    [[1], [3]],
    max_new_tokens=3,
    temperature=temperature,
    top_p=top_p,
    key=jax.random.key(0),
  )
  assert got == [[2, 3, 4], [4, 5, 6]]


def test_draws_do_not_depend_on_the_neighbours(gpt2_config, base_params):
  def draw(model, params, prompts, seed=0):
    key = jax.random.key(seed)
    return generation.generate(
      model, params, None, prompts, max_new_tokens=12, temperature=5.0, key=key
    )

  model, params = families.model(gpt2_config), base_params(gpt2_config)
  rows = draw(model, params, [[1, 2], [3], [1, 2]])
  assert draw(model, params, [[1, 2], [3], [1, 2]]) == rows
  assert draw(model, params, [[1, 2], [50] * 20, [9, 8, 7]])[0] == rows[0]
  assert rows[2] != rows[0]  # A stream of its own for each row.
  assert draw(model, params, [[1, 2], [3], [1, 2]], seed=1)[0] != rows[0]
  together = draw(Stub(LOGITS), {}, [[1], [2], [3]])
  assert draw(Stub(LOGITS), {}, [[1]]) == together[:1]


def test_prompts_of_many_lengths_share_a_program():
  before = generation._run._cache_size()
  for length in (1, 5, 16):
    rows = [[1] * length, [2]]
    generation.generate(Stub(), {}, None, rows, max_new_tokens=3)
  assert generation._run._cache_size() == before + 1


def test_text_fills_the_learned_positions_and_no_more(gpt2_config, base_params):
  model, params = families.model(gpt2_config), base_params(gpt2_config)
  prompt = list(range(1, 41))
  (got,) = generation.generate(model, params, None, [prompt], max_new_tokens=24)
  apply = jax.jit(lambda rows: model.apply({"params": params}, rows))
  assert got == plain(apply, prompt, 24)
  with pytest.raises(ValueError, match="at most 64 tokens.*got 65"):
    generation.generate(model, params, None, [prompt], max_new_tokens=25)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"prompts": []}, "at least one token"),
    ({"prompts": [[1], []]}, "at least one token"),
    ({"prompts": [[1, 96]]}, r"token ids in \[0, 96\), got \[96\]"),
    ({"prompts": [[-1]]}, r"token ids in \[0, 96\), got \[-1\]"),
    ({"max_new_tokens": 0}, "max_new_tokens >= 1, got 0"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"top_p": 1.5}, "top_p=1.5"),
    ({"temperature": 1.0, "key": None}, "expected a key to sample"),
    ({"factors": {}}, "None for one without, got factors"),
  ],
)
def test_what_makes_no_sense_is_refused(gpt2_config, changes, message):
  given = {
    "prompts": [[1]],
    "max_new_tokens": 2,
    "factors": None,
    "key": jax.random.key(0),
    **changes,
  }
  with pytest.raises(ValueError, match=message):
    generation.generate(families.model(gpt2_config), {}, **given)


def test_only_language_models_generate(gpt2_config):
  model = families.model(gpt2_config, head=heads.Classifier(2))
  with pytest.raises(ValueError, match="language model"):
    generation.generate(model, {}, None, [[1]], max_new_tokens=2)
