"""FlexLoRA: decomposes the mean product into factors of each client's rank.

Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under
Heterogeneous Tasks and Client Resources", 2024 (arXiv 2402.11505). HLoRA (Liu
et al., 2025, arXiv 2503.00813) reconstructs and decomposes in the same way: use
the same function for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  aggregators,
  clients,
  factors,
  product_aggregation,
  rounds,
)


def flex_lora(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  *,
  ranks: Sequence[int] = (1, 4, 16),
  of_client: Callable[[Any], Any] | None = None,
  upload: base.Compressor | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FlexLoRA: the SVD of `sum_k p_k a_k b_k`, truncated to each tier's rank.

  The new product is the sum itself if the sum has at most the adapter's rank,
  else the nearest product of that rank. `p_k` is client k's number of examples
  over the cohort's; it also weights heads. There is no server optimizer. Only
  the first ranks, up to the client's rank, travel both ways; a client keeps
  nothing. The first download has the first ranks of the initial factors.

  The paper scales by alpha / r_k, with the client's rank r_k. Here all clients
  train with one `LoRA.scale`, as in the code of FLASC's authors.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    ranks: the rank of each tier, see `factors.tiers`; the best last.
    of_client: a function from client numbers to tier numbers.
    upload: compresses the updates; None for no compression.
    population: the number of clients, if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: from `init`, if a rank is out of range.
  """
  return product_aggregation.product_round(
    clients.local_update(loss_fn, client_optimizer),
    nearest_products,
    lambda trainable: factors.tiers(trainable, ranks, of_client, upload),
    population=population,
    placement=placement,
  )


def nearest_products(
  trainable: Any,
  trained: Any,
  weights: Any,
  key: Any,
) -> product_aggregation.Combined:
  """Computes the factors whose products are nearest to the mean products.

  Arguments are those of `combine` in `product_aggregation.product_round`.
  """
  del key  # Deterministic.
  weights = aggregators.normalised(weights)
  stacks = factors.stacks(trained, weights)
  rank = factors.rank(trainable)
  nearest = {
    path: factors.truncate(pair, rank) for path, pair in stacks.items()
  }
  mean = aggregators.weighted_sum(trained, weights)
  return product_aggregation.Combined(factors.put(mean, nearest))
