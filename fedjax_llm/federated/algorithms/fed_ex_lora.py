"""FedEx-LoRA: the base model takes what the mean factors miss of the mean.

Singhal, Ponkshe, Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and
Efficient Fine-Tuning of Foundation Models", 2024 (arXiv 2410.09432).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  clients,
  factors,
  gathering,
  product_aggregation,
  rounds,
)


def fed_ex_lora(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  *,
  scale: float,
  weighted: bool = False,
  upload: base.Compressor | None = None,
  population: int,
  **placement: Any,
) -> rounds.FederatedAlgorithm:
  """FedEx-LoRA: factors are averaged, and the kernels take the residual.

  The server adds `scale * (mean(a_k b_k) - mean(a_k) mean(b_k))` to the base
  kernels, so that the model is the mean of the clients' models exactly, as far
  as their uploads are. Heads are averaged. A server optimizer has no place: the
  residual would undo its step.

  Up travels the update of all factors; down the factors and the residuals that
  the client missed. That of a round of K clients is the product of (K - 1) * r
  columns and rows, because it is `sum_k p_k (a_k - mean a) (b_k - mean b)` and
  these sum to zero: the factors of all clients but one, or the dense matrices
  if those are smaller. A client keeps the residual between its visits.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the paper's is AdamW.
    scale: `LoRA.scale`.
    weighted: weight clients by the cohort's weights; the paper's mean is plain.
    upload: what compresses the updates; None for nothing.
    population: number of clients.
    **placement: `placement` of `rounds.federated_round`.
  """

  def tiers_of(trainable):
    return factors.tiers(trainable, [factors.rank(trainable)], upload=upload)

  def combine(trainable, trained, weights, key):
    del trainable, key  # Replaced; deterministic.
    present = weights > 0
    weights = weights if weighted else present.astype(weights.dtype)
    weights = gathering.normalised(weights)
    mean = gathering.mean(trained, weights)
    centred = jax.tree.map(lambda x, y: x - y[None], trained, mean)
    added = factors.stacks(centred, weights)
    return product_aggregation.Combined(
      mean, added, present & _after_first(present)
    )

  return product_aggregation.product_round(
    clients.local_update(loss_fn, client_optimizer),
    combine,
    tiers_of,
    scale=scale,
    population=population,
    **placement,
  )


def _after_first(present):
  """Clients that come after the first that is there."""
  return jnp.cumsum(present) > 1
