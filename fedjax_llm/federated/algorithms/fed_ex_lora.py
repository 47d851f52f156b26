"""FedEx-LoRA: the base model absorbs the error of averaging factors.

Singhal, Ponkshe, Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and
Efficient Fine-Tuning of Foundation Models", 2024 (arXiv 2410.09432).
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  aggregators,
  clients,
  factors,
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
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FedEx-LoRA: factors are averaged, and the kernels take the residual.

  The server adds `scale * (mean(a_k b_k) - mean(a_k) mean(b_k))` to the base
  kernels. So the model is exactly the mean of the clients' models, if their
  uploads are exact. Heads are averaged. There is no server optimizer: the
  residual would undo its step.

  A client uploads the update of all factors. It downloads the factors and the
  residuals since its last download. The residual of a round of K clients is
  `sum_k p_k (a_k - mean a) (b_k - mean b)`. The weighted differences sum to
  zero, so the factors of all clients but one are enough: (K - 1) * r columns
  and rows. If the dense matrices are smaller, they are sent instead. A client
  keeps the sum of the residuals between its rounds.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the paper's is AdamW.
    scale: `LoRA.scale`.
    weighted: whether to weight clients by their numbers of examples; the
      paper's mean counts every client once.
    upload: compresses the updates; None for no compression.
    population: the number of clients.
    placement: see `clients.Placement`; all devices if not given.
  """

  def tiers_of(trainable):
    return factors.tiers(trainable, [factors.rank(trainable)], upload=upload)

  def combine(trainable, trained, weights, key):
    del trainable, key  # Replaced; deterministic.
    present = weights > 0
    weights = weights if weighted else present.astype(weights.dtype)
    weights = aggregators.normalised(weights)
    mean = aggregators.weighted_sum(trained, weights)
    centred = jax.tree.map(lambda x, y: x - y[None], trained, mean)
    added = factors.stacks(centred, weights)
    after_first = jnp.cumsum(present) > 1
    return product_aggregation.Combined(mean, added, present & after_first)

  return product_aggregation.product_round(
    clients.local_update(loss_fn, client_optimizer),
    combine,
    tiers_of,
    scale=scale,
    population=population,
    placement=placement,
  )
