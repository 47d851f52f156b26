"""Classification: the loss that clients train and what evaluation scores.

A row has one label, or any number of them where the model's head says so.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Num

from fedjax_llm.models import heads


def row_losses(
  scores: Float[Array, "rows labels"],
  labels: Num[Array, "rows ..."],
  *,
  multi_label: bool = False,
) -> Float[Array, " rows"]:
  """How far the scores of each row are from its labels, in nats.

  Args:
    scores: logits of the labels.
    labels: int32 [rows], the label of each; or with `multi_label` float32
      [rows, labels], 1 for those that hold and 0 for the others.
    multi_label: whether labels are independent: the mean over them of their
      binary cross-entropies, as torch's `BCEWithLogitsLoss` has it, in place
      of the cross-entropy of a softmax.

  Raises:
    ValueError: if `labels` have another shape.
  """
  expected = scores.shape if multi_label else scores.shape[:1]
  if labels.shape != expected:
    raise ValueError(
      f"expected labels {expected} with {multi_label=}, got {labels.shape}."
    )
  if multi_label:
    return optax.sigmoid_binary_cross_entropy(scores, labels).mean(-1)
  return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def loss_fn(model: nn.Module) -> Callable[..., tuple[Array, Array]]:
  """The loss that `federated.clients.local_update` differentiates.

  Args:
    model: a LoRA-parametrised model with a head.

  Returns:
    `fn(factors, params, examples, mask, key) -> (total, count)`: the summed
    `row_losses` of the rows that `mask` [rows] tells from padding, and their
    number. `examples` has `labels`, and `tokens` with `segments` or, of
    images, `pixels`. `key` draws the dropout.

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
  """The function that `evaluation.classification` maps over rows.

  Args:
    model: a model with a head.

  Returns:
    `fn(factors, params, examples)`: the `loss` [rows] and the `scores`
    [rows, labels] of each row. `factors` is None for a finished model.

  Raises:
    ValueError: if the model has no head.
  """
  head = _head(model)

  def fn(factors, params, examples):
    variables = {"params": params}
    if factors is not None:
      variables["lora"] = factors
    scores: Any = model.apply(variables, *_inputs(examples))
    labels, multi_label = examples.labels, head.multi_label
    losses = row_losses(scores, labels, multi_label=multi_label)
    return {"loss": losses, "scores": scores}

  return fn


def _head(model: Any) -> heads.Classifier:
  if model.head is None:
    raise ValueError(
      "expected a model that classifies, got one without a head. Give it a"
      " heads.Classifier."
    )
  return model.head


def _inputs(examples: Any) -> tuple[Any, ...]:
  """What a model reads of examples: images, or tokens and their segments."""
  if hasattr(examples, "pixels"):
    return (examples.pixels,)
  return examples.tokens, examples.segments
