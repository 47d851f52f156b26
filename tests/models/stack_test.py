"""A scan over layers is the loop over them, and outputs are plain products."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import attention, heads, lora, stack

LAYERS, WIDTH = 3, 4


@dataclasses.dataclass(frozen=True)
class Config:
  num_hidden_layers: int = LAYERS
  hidden_size: int = WIDTH
  vocab_size: int = 7
  tie_word_embeddings: bool = False


class Block(stack.Layer):
  """Adds tanh(x W) and a number of the layer's own; sees the past if any."""

  @nn.compact
  def __call__(self, x, own_and_past, factor):
    own, past = own_and_past
    y = nn.Dense(WIDTH, use_bias=False, name="dense")(x)
    x = x + factor * jnp.tanh(y)
    x = x if own is None else x + own
    if past is not None:
      keys, values = past
      x, past = x + keys.sum((1, 2))[..., None, :], (keys + 1, values + 2)
    return x, past


class Model(nn.Module):
  config: Config = Config()
  adapter: lora.LoRA | None = None
  head: heads.Classifier | None = None
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  own: bool = False

  @nn.compact
  def __call__(self, x, factor=0.5, cache=None):
    own = jnp.arange(LAYERS, dtype=jnp.float32) if self.own else None
    shared = (jnp.float32(factor),)
    return stack.cached_layers(Block, self, True, x, own, shared, cache)


@pytest.fixture
def x():
  rng = np.random.default_rng(0)
  return rng.normal(size=(2, 5, WIDTH)).astype(np.float32)


def by_loop(params, x, own=(0.0,) * LAYERS, past=(0.0,) * LAYERS):
  kernels = np.asarray(params["layers"]["dense"]["kernel"])
  assert kernels.shape == (LAYERS, WIDTH, WIDTH)
  for kernel, number, key in zip(kernels, own, past, strict=True):
    x = x + 0.5 * np.tanh(x @ kernel) + number + key
  return x


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_scan_is_a_loop_over_the_layers(x, remat, own):
  model = Model(remat=remat, own=own)
  params = model.init(jax.random.key(0), x)["params"]
  got, cache = model.apply({"params": params}, x)
  numbers = range(LAYERS) if own else (0.0,) * LAYERS
  np.testing.assert_allclose(got, by_loop(params, x, numbers), rtol=1e-5)
  assert cache is None
  # Each layer has drawn its own parameters.
  kernels = params["layers"]["dense"]["kernel"]
  assert not np.allclose(kernels[0], kernels[1])


def test_remat_computes_the_same_gradient(x):
  params = Model().init(jax.random.key(0), x)["params"]

  def gradient(model):
    loss = lambda params: (model.apply({"params": params}, x)[0] ** 2).sum()
    return jax.grad(loss)(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    gradient(Model()),
    gradient(Model(remat=True)),
  )


def test_each_layer_reads_and_writes_its_own_cache(x):
  cache = attention.empty_cache((LAYERS, 2, 5, 1, WIDTH), jnp.float32)
  keys = jnp.arange(LAYERS, dtype=jnp.float32).reshape(LAYERS, 1, 1, 1, 1)
  cache = cache._replace(keys=cache.keys + keys)
  model = Model()
  params = model.init(jax.random.key(0), x)["params"]
  got, after = model.apply({"params": params}, x, cache=cache)
  # Five slots of the same number are summed.
  expected = by_loop(params, x, past=[5.0 * n for n in range(LAYERS)])
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  np.testing.assert_array_equal(after.keys, cache.keys + 1)
  np.testing.assert_array_equal(after.values, cache.values + 2)
  assert after.used is cache.used


class Output(nn.Module):
  config: Config
  head: heads.Classifier | None = None
  adapter: lora.LoRA | None = None
  dtype: jnp.dtype = jnp.bfloat16

  @nn.compact
  def __call__(self, x, segments=None):
    embed = nn.Embed(self.config.vocab_size, WIDTH, name="embed_tokens")
    return stack.output(self, x, segments, embed)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_products_with_the_embedding_or_a_kernel(x, tied):
  model = Output(Config(tie_word_embeddings=tied))
  params = model.init(jax.random.key(0), x)["params"]
  logits = model.apply({"params": params}, x)
  assert logits.dtype == jnp.float32  # Whatever the model computes in.
  kernel = (
    params["embed_tokens"]["embedding"].T
    if tied
    else params["lm_head"]["kernel"]
  )
  np.testing.assert_allclose(logits, x @ kernel, atol=0.05)
  assert ("lm_head" in params) == (not tied)


def test_a_head_scores_the_last_token_of_a_row(x):
  model = Output(Config(), heads.Classifier(3), dtype=jnp.float32)
  segments = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], jnp.int32)
  variables = model.init(jax.random.key(0), x, segments)
  scores = model.apply(variables, x, segments)
  (kernel,) = (
    leaf for leaf in jax.tree.leaves(variables) if leaf.shape == (WIDTH, 3)
  )
  last = np.stack([x[0, 2], x[1, 4]])
  np.testing.assert_allclose(scores, last @ kernel, rtol=1e-4, atol=1e-6)
