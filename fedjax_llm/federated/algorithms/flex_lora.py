"""FlexLoRA: the mean product is decomposed anew, for each client to its rank.

Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under
Heterogeneous Tasks and Client Resources", 2024 (arXiv 2402.11505). HLoRA (Liu
et al., 2025, arXiv 2503.00813) reconstructs and decomposes likewise: it is the
same function here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import optax

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  clients,
  factors,
  gathering,
  product_aggregation,
  rounds,
)


def flex_lora(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  *,
  ranks: Sequence[int] = (1, 4, 16),
  of_client: Callable[[Any], Any] | None = None,
  balanced: bool = False,
  upload: base.Compressor | None = None,
  **placement: Any,
) -> rounds.FederatedAlgorithm:
  """FlexLoRA: the SVD of `sum_k p_k a_k b_k`, truncated to each tier's rank.

  Exact if the adapter's rank is at least that of the sum, else the nearest of
  its rank; `p_k` are the cohort's weights, and heads are averaged by them.
  There is no server optimizer. Up and down travel a client's ranks of the
  factors, and a client keeps nothing. The first message is of the first ranks
  of the factors that training starts from.

  The paper scales by alpha / r_k, the rank of the client. Here all train under
  one `LoRA.scale`, as FLASC's authors have it, so it does not appear.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    ranks: of the tiers, see `factors.tiers`; the best last.
    of_client: numbers of clients -> numbers of their tiers.
    balanced: split the singular values evenly between the factors; the paper
      gives all to `b`, `a = U`, `b = S V'`. Split evenly, a rank whose singular
      value is zero is zero in both factors, and never trained again.
    upload: what compresses the updates; None for nothing.
    **placement: `population` (if the upload keeps a state for each client),
      `placement` of `rounds.federated_round`.

  Raises:
    ValueError: from `init`, if a rank is out of range.
  """
  return product_aggregation.product_round(
    clients.local_update(loss_fn, client_optimizer),
    functools.partial(nearest_products, balanced=balanced),
    lambda trainable: factors.tiers(trainable, ranks, of_client, upload),
    **placement,
  )


def nearest_products(
  trainable: Any,
  trained: Any,
  weights: Any,
  key: Any,
  *,
  balanced: bool = False,
) -> product_aggregation.Combined:
  """The factors whose products are nearest to the mean products.

  Arguments are as of `combine` of `product_aggregation.product_round`, and
  `balanced` as in `flex_lora`.
  """
  del key  # Deterministic.
  weights = gathering.normalised(weights)
  stacks = factors.stacks(trained, weights)
  rank = factors.rank(trainable)
  nearest = {
    path: factors.truncate(pair, rank, balanced=balanced)
    for path, pair in stacks.items()
  }
  mean = gathering.mean(trained, weights)
  return product_aggregation.Combined(factors.put(mean, nearest))
