"""Next-token prediction: the loss for training, the scores for evaluation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedjax_llm.models import lora


def token_losses(
  logits: Float[Array, "batch time vocab"],
  targets: Int[Array, "batch time"],
) -> Float[Array, "batch time"]:
  """Returns the negative log-likelihood of each target, in nats."""
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  # Not log_softmax: it would keep a second array of the logits' size.
  return jax.nn.logsumexp(logits, axis=-1) - picked


def loss_fn(model: nn.Module) -> Callable[..., tuple[Array, Array]]:
  """Returns the loss that `federated.clients.local_update` differentiates.

  Args:
    model: a LoRA-parametrised language model.

  Returns:
    A function `fn(factors, params, examples, mask, key) -> (total, count)`.
    `examples` is a `data.batches.Examples`. `mask` [batch] is True for real
    rows and False for padding. `total` is the summed negative log-likelihood,
    in nats, of the targets that both `examples.mask` and `mask` select. `count`
    is the number of these targets. `key` draws the dropout.
  """

  def fn(factors, params, examples, mask, key):
    tokens = examples.tokens
    logits: Any = model.apply(
      {"params": params, "lora": factors},
      tokens[:, :-1],
      _inputs(examples.segments),
      deterministic=False,
      rngs={"dropout": key},
    )
    counted: Bool[Array, "batch time"] = examples.mask & mask[:, None]
    losses = token_losses(logits, tokens[:, 1:])
    return jnp.where(counted, losses, 0).sum(), counted.sum()

  return fn


def score_fn(model: nn.Module) -> Callable[..., dict[str, Any]]:
  """Returns the function that `evaluation.likelihood` maps over rows.

  Args:
    model: a language model.

  Returns:
    A function `fn(factors, params, examples)` that returns three arrays [batch]
    over the targets that `examples.mask` selects: `loss`, the summed negative
    log-likelihood in nats; `right`, the number of targets with the largest
    logit; and `tokens`, the number of targets. `factors` is None for a model
    without an adapter.
  """

  def fn(factors, params, examples):
    targets = examples.tokens[:, 1:]
    logits: Any = model.apply(
      lora.variables(params, factors),
      examples.tokens[:, :-1],
      _inputs(examples.segments),
    )
    losses = token_losses(logits, targets)
    right = (logits.argmax(-1) == targets) & examples.mask
    return {
      "loss": jnp.where(examples.mask, losses, 0).sum(-1),
      "right": right.sum(-1),
      "tokens": examples.mask.sum(-1),
    }

  return fn


def _inputs(segments):
  """Drops the segment of the last token, which is a target but not an input."""
  return None if segments is None else segments[:, :-1]
