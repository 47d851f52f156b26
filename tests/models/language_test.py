from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import decoder, language, lora

KEY = jax.random.key(0)


class Rows(NamedTuple):
  tokens: np.ndarray
  mask: np.ndarray
  segments: np.ndarray | None = None


@pytest.fixture
def model(config):
  return decoder.Decoder(config, lora.LoRA(rank=2))


@pytest.fixture
def variables(config, model, base_params, lora_factors):
  return lora_factors(model), base_params(config)


@pytest.fixture
def rows(tokens):
  mask = np.random.default_rng(1).random((3, 16)) < 0.7
  return Rows(tokens, mask)


def np_losses(model, variables, tokens):
  """Negative log-probabilities, one token at a time, and the likeliest."""
  factors, params = variables
  logits = np.asarray(
    jax.jit(model.apply)({"params": params, "lora": factors}, tokens[:, :-1]),
    np.float64,
  )
  losses, likeliest = np.zeros(logits.shape[:2]), logits.argmax(-1)
  for row, position in np.ndindex(losses.shape):
    scores = logits[row, position]
    target = tokens[row, position + 1]
    likelihood = np.exp(scores[target]) / np.exp(scores).sum()
    losses[row, position] = -np.log(likelihood)
  return losses, likeliest == tokens[:, 1:]


def test_token_losses_match_numpy():
  logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
  targets = np.array([[0, 4, 2], [1, 1, 3]])
  losses = language.token_losses(jnp.asarray(logits), jnp.asarray(targets))
  for row, position in np.ndindex(2, 3):
    p = np.exp(logits[row, position]) / np.exp(logits[row, position]).sum()
    expected = -np.log(p[targets[row, position]])
    np.testing.assert_allclose(losses[row, position], expected, rtol=1e-5)


def test_large_logits_do_not_overflow():
  logits = jnp.array([[[1e4, 0.0]]])
  assert language.token_losses(logits, jnp.array([[0]])) == 0
  assert language.token_losses(logits, jnp.array([[1]])) == 1e4


def test_the_loss_sums_what_counts(model, variables, rows):
  present = np.array([True, False, True])
  total, count = jax.jit(language.loss_fn(model))(
    *variables, rows, present, jax.random.key(0)
  )
  losses, _ = np_losses(model, variables, rows.tokens)
  counted = rows.mask & present[:, None]
  np.testing.assert_allclose(total, losses[counted].sum(), rtol=1e-5)
  assert count == counted.sum()


def test_padded_rows_have_no_gradient(model, variables, rows):
  factors, params = variables
  padding = rows.tokens.copy()
  padding[1] = 0
  loss = language.loss_fn(model)
  gradient = jax.jit(
    jax.grad(lambda f, rows, mask: loss(f, params, rows, mask, KEY)[0])
  )
  present = np.array([True, False, True])
  jax.tree.map(
    np.testing.assert_array_equal,
    gradient(factors, rows, present),
    gradient(factors, Rows(padding, rows.mask), present),
  )
  nothing = gradient(factors, rows, np.zeros(3, bool))
  assert not any(x.any() for x in jax.tree.leaves(nothing))


def test_training_draws_dropout_and_scoring_does_not(config, variables, rows):
  model = decoder.Decoder(config, lora.LoRA(rank=2, dropout=0.5))
  present = np.ones(3, bool)
  loss = jax.jit(language.loss_fn(model))
  first, _ = loss(*variables, rows, present, jax.random.key(0))
  again, _ = loss(*variables, rows, present, jax.random.key(0))
  other, _ = loss(*variables, rows, present, jax.random.key(1))
  assert first == again != other
  scored = jax.jit(language.score_fn(model))(*variables, rows)["loss"].sum()
  losses, _ = np_losses(model, variables, rows.tokens)
  np.testing.assert_allclose(scored, losses[rows.mask].sum(), rtol=1e-5)


def test_scores_are_sums_of_each_row(model, variables, rows):
  scores = jax.jit(language.score_fn(model))(*variables, rows)
  losses, right = np_losses(model, variables, rows.tokens)
  np.testing.assert_allclose(
    scores["loss"], (losses * rows.mask).sum(1), rtol=1e-5
  )
  np.testing.assert_array_equal(scores["right"], (right & rows.mask).sum(1))
  np.testing.assert_array_equal(scores["tokens"], rows.mask.sum(1))


def test_a_base_model_is_scored_without_factors(config, variables, rows):
  _, params = variables
  alone = jax.jit(language.score_fn(decoder.Decoder(config)))(
    None, params, rows
  )
  zeros = jax.tree.map(jnp.zeros_like, variables[0])
  model = decoder.Decoder(config, lora.LoRA(rank=2))
  with_zeros = jax.jit(language.score_fn(model))(zeros, params, rows)
  np.testing.assert_allclose(alone["loss"], with_zeros["loss"], rtol=1e-6)
