"""What is trained is what is evaluated, with an adapter and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.data import batches
from fedjax_llm.experiments import objectives
from fedjax_llm.models import decoder, families, heads, lora

CONFIG = decoder.DecoderConfig(
  vocab_size=40,
  hidden_size=8,
  intermediate_size=16,
  num_hidden_layers=1,
  num_attention_heads=2,
  num_key_value_heads=2,
  head_dim=4,
  max_position_embeddings=16,
)
TOKENS = np.random.default_rng(0).integers(1, 40, (4, 7), np.int32)
ROWS = {
  "language": batches.Examples(TOKENS, np.ones((4, 6), bool)),
  "classification": batches.Labelled(
    TOKENS, np.ones((4, 7), np.int32), np.array([0, 2, 1, 2], np.int32)
  ),
}
KINDS = {
  "language": objectives.LANGUAGE,
  "classification": objectives.CLASSIFICATION,
}


def mean_loss(loss_fn, trainable, frozen, rows):
  """The mean over what counts, and its gradient."""
  real, key = jnp.ones(len(rows.tokens), bool), jax.random.key(1)

  def fn(trainable):
    total, count = loss_fn(trainable, frozen, rows, real, key)
    return total / count

  return jax.jit(jax.value_and_grad(fn))(trainable)


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_that_is_trained_is_the_one_that_is_evaluated(name):
  kind, rows = KINDS[name], ROWS[name]
  head = heads.Classifier(3) if name == "classification" else None
  network = families.model(CONFIG, lora.LoRA(rank=2), head)
  variables = jax.jit(network.init)(jax.random.key(0), TOKENS)
  factors = jax.tree.map(lambda x: x + 0.1, variables["lora"])
  loss, _ = mean_loss(kind.loss_fn(network), factors, variables["params"], rows)
  evaluate = kind.evaluator(kind.score_fn(network), rows)
  told = evaluate(factors, variables["params"])
  assert told["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_without_an_adapter_all_parameters_are_trained(name):
  kind, rows = KINDS[name], ROWS[name]
  head = heads.Classifier(3) if name == "classification" else None
  network = families.model(CONFIG, None, head)
  params = jax.jit(network.init)(jax.random.key(0), TOKENS)["params"]
  whole = kind.of_all_parameters()
  loss, gradient = mean_loss(whole.loss_fn(network), params, {}, rows)
  # Embeddings of tokens that are not there have none.
  moved = jax.tree.map(lambda x: bool(np.abs(x).max() > 0), gradient)
  assert jax.tree.all(moved)
  evaluate = whole.evaluator(whole.score_fn(network), rows)
  assert evaluate(params, {})["loss"] == pytest.approx(float(loss), rel=1e-5)
  # Where all of a model is trained, nothing of it is taken as frozen.
  frozen = jax.tree.map(jnp.zeros_like, params)
  again, _ = mean_loss(whole.loss_fn(network), params, frozen, rows)
  assert again == loss
