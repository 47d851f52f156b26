"""CG-FedLLM: federated averaging of LoRA factors with a learned codec.

Wu et al., "CG-FedLLM: How to Compress Gradients in Federated Fine-tuning for
Large Language Models", 2024 (arXiv 2405.13746). Its fine-tuning stage, FAF:

  FAF            `cg_fed_llm(..., codec=codec, compressor_of=autoencoder)`
  sum            the same with `aggregate=sum_updates()`: Algorithm 1 has
                 a sum where the code it builds on, Shepherd, has a mean. It is
                 of updates: K whole adapters would grow K times a round
  product space  `cg_fed_llm_products`: Algorithm 1 names the products B A

The paper does not say whether a client sends its adapter or its update: that
is the `representation`. Nor does it say what the codec costs: its encoder is
downloaded once by every client.
"""

from typing import Any

import optax

from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  codec_rounds,
  product_aggregation,
  rounds,
)
from fedjax_llm.federated.algorithms import flex_lora


def cg_fed_llm(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  population: int,
  representation: codec_rounds.Representation = "delta",
  aggregate: aggregators.Aggregator | None = None,
  placement: clients.Placement | None = None,
  **coding: Any,
) -> rounds.FederatedAlgorithm:
  """FAF: what arrives is averaged, `a` and `b` each by itself.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: Shepherd's is AdamW, afresh in every round.
    server_optimizer: the paper's step of eta is `optax.sgd(eta)`; 1 replaces
      the adapter by the mean.
    population: number of clients.
    representation: what goes through the codec: "delta", the update, which is
      received minus trained; or "state", the trained adapter itself. The server
      adds up updates in either case: the sum of K whole adapters would grow K
      times a round even if nobody trained.
    aggregate: None for the weighted mean.
    placement: see `clients.Placement`; all devices if not given.
    **coding: `codec`, `compressor_of`, `setup_bytes`, `volunteers` of
      `codec_rounds.with_codec`.

  Raises:
    ValueError: if `representation` is neither, or `volunteers` are not of the
      population.
  """
  local_update = clients.local_update(loss_fn, client_optimizer)

  def compose(compressor):
    return rounds.federated_round(
      local_update,
      server_optimizer,
      channel=codec_rounds.channel(compressor, representation),
      aggregate=aggregate,
      population=population,
      placement=placement,
    )

  return codec_rounds.with_codec(
    compose, population=population, placement=placement, **coding
  )


def cg_fed_llm_products(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  *,
  population: int,
  representation: codec_rounds.Representation = "delta",
  placement: clients.Placement | None = None,
  **coding: Any,
) -> rounds.FederatedAlgorithm:
  """FAF whose server averages the products of what it decodes.

  Their mean is decomposed to factors of the adapter's rank as FlexLoRA does, so
  that there is no residual, and no server optimizer. Arguments and errors are
  those of `cg_fed_llm`.
  """
  local_update = clients.local_update(loss_fn, client_optimizer)

  def compose(compressor):
    channel = codec_rounds.channel(compressor, representation)
    return product_aggregation.product_round(
      local_update,
      flex_lora.nearest_products,
      lambda trainable: channels.tiers_of(channel),
      population=population,
      placement=placement,
    )

  return codec_rounds.with_codec(
    compose, population=population, placement=placement, **coding
  )
