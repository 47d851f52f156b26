"""Classification: the loss for training and the scores for evaluation.

A row has one label, or any number of labels if the head is multi-label.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Num

from fedjax_llm.models import heads, lora


def row_losses(
  scores: Float[Array, "rows labels"],
  labels: Num[Array, "rows ..."],
  *,
  multi_label: bool = False,
) -> Float[Array, " rows"]:
  """Returns the cross-entropy of each row, in nats.

  Args:
    scores: the logits of the labels.
    labels: the label of each row, int32 [rows]. With `multi_label`, float32
      [rows, labels], with 1 for each label of a row and 0 for the others.
    multi_label: whether a row may have several labels. If True, the loss is the
      binary cross-entropy, averaged over labels, as in torch's
      `BCEWithLogitsLoss`. If False, it is the cross-entropy of a softmax.

  Raises:
    ValueError: if `labels` have the wrong shape.
  """
  expected = scores.shape if multi_label else scores.shape[:1]
  if labels.shape != expected:
    raise ValueError(
      f"expected labels {expected} with {multi_label=}, got {labels.shape}."
      " Give a head whose multi_label fits the data."
    )
  if multi_label:
    return optax.sigmoid_binary_cross_entropy(scores, labels).mean(-1)
  return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def loss_fn(model: nn.Module) -> Callable[..., tuple[Array, Array]]:
  """Returns the loss that `federated.clients.local_update` differentiates.

  Args:
    model: a LoRA-parametrised model with a head.

  Returns:
    A function `fn(factors, params, examples, mask, key) -> (total, count)`.
    `total` is the sum of `row_losses` over real rows, and `count` is their
    number. `mask` [rows] is True for real rows and False for padding.
    `examples` has the attributes `labels`, and either `tokens` and `segments`
    or, for images, `pixels`. `key` draws the dropout.

  Raises:
    ValueError: if the model has no head.
  """
  head = _head(model)

  def fn(factors, params, examples, mask, key):
    scores: Any = model.apply(
      {"params": params, "lora": factors},
      *_inputs(examples),
      deterministic=False,
      rngs={"dropout": key},
    )
    losses = row_losses(scores, examples.labels, multi_label=head.multi_label)
    return jnp.where(mask, losses, 0).sum(), mask.sum()

  return fn


def score_fn(model: nn.Module) -> Callable[..., dict[str, Any]]:
  """Returns the function that `evaluation.classification` maps over rows.

  Args:
    model: a model with a head.

  Returns:
    A function `fn(factors, params, examples)` that returns the arrays `loss`
    [rows] and `scores` [rows, labels]. `factors` is None for a model without an
    adapter.

  Raises:
    ValueError: if the model has no head.
  """
  head = _head(model)

  def fn(factors, params, examples):
    variables = lora.variables(params, factors)
    scores: Any = model.apply(variables, *_inputs(examples))
    losses = row_losses(scores, examples.labels, multi_label=head.multi_label)
    return {"loss": losses, "scores": scores}

  return fn


def _head(model: Any) -> heads.Classifier:
  if model.head is None:
    raise ValueError(
      "expected a model with a classification head, got one without a head."
      " Give it a heads.Classifier."
    )
  return model.head


def _inputs(examples: Any) -> tuple[Any, ...]:
  """Returns the inputs of a model: images, or tokens and their segments."""
  if hasattr(examples, "pixels"):
    return (examples.pixels,)
  return examples.tokens, examples.segments
