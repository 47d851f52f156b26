"""Next-token prediction: the loss that clients train and evaluation reports."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_losses(
  logits: Float[Array, "batch time vocab"],
  targets: Int[Array, "batch time"],
) -> Float[Array, "batch time"]:
  """Negative log-likelihood of each target, in nats."""
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  # Not log_softmax: it would keep a second array of the logits' size.
  return jax.nn.logsumexp(logits, axis=-1) - picked


def loss_fn(model: nn.Module) -> Callable[..., tuple[Array, Array]]:
  """The loss that `federated.clients.local_update` differentiates.

  Args:
    model: a LoRA-parametrised language model.

  Returns:
    `fn(factors, params, examples, mask, key) -> (total, count)`: the summed
    negative log-likelihood in nats of the tokens that count, and their number.
    `examples.tokens` is [batch, time + 1], `examples.mask` [batch, time],
    `examples.segments` None or [batch, time + 1], see `models.attention`, and
    `mask` [batch] tells real rows from padding. `key` draws the dropout.
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
  """The function that `evaluation.likelihood` maps over rows.

  Returns:
    `fn(factors, params, examples)`: for each row the summed negative
    log-likelihood, the number of tokens predicted right by the largest logit,
    and the number of tokens that count.
  """

  def fn(factors, params, examples):
    variables = {"params": params}
    if factors is not None:
      variables["lora"] = factors
    targets = examples.tokens[:, 1:]
    logits: Any = model.apply(
      variables, examples.tokens[:, :-1], _inputs(examples.segments)
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
  """The segments of the tokens that are read; the last is only predicted."""
  return None if segments is None else segments[:, :-1]
