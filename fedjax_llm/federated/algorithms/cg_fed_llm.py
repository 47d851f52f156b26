"""CG-FedLLM: federated averaging of LoRA factors with a learned codec.

Wu et al., "CG-FedLLM: How to Compress Gradients in Federated Fine-tuning for
Large Language Models", 2024 (arXiv 2405.13746). Its fine-tuning stage, FAF:

  FAF            `cg_fed_llm(..., coding=coding)`
  sum            the same with `aggregate=sum_updates()`: Algorithm 1 has a sum,
                 but the code it builds on, Shepherd, has a mean
  product space  `cg_fed_llm_products`: Algorithm 1 names the products B A

The paper does not say whether a client sends its adapter or its update; here
`representation` selects one. The paper does not count the bytes of the codec;
here every client downloads the encoder once.
"""

from typing import Any, Literal

import optax

from fedjax_llm.compression import base
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  codec_state,
  product_aggregation,
  rounds,
)
from fedjax_llm.federated.algorithms import flex_lora

Representation = Literal["delta", "state"]


def cg_fed_llm(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  coding: codec_state.Coding,
  population: int,
  representation: Representation = "delta",
  volunteers: Any = None,
  aggregate: aggregators.Aggregator | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FAF: averages the decoded factors, `a` and `b` separately.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
      Shepherd uses AdamW.
    server_optimizer: optimizer of the server. The paper's step size eta is
      `optax.sgd(eta)`; with 1 the mean replaces the adapter.
    coding: the codec.
    population: number of clients.
    representation: what goes through the codec: "delta", the update, which is
      received minus trained; or "state", the trained adapter. The server adds
      up updates in both cases: a sum of K adapters would grow K times a round
      even if nobody trained.
    volunteers: see `codec_state.with_codec`.
    aggregate: aggregator of the updates; None for the weighted mean.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if `representation` is neither "delta" nor "state", or the
      length of `volunteers` is not `population`; from `init`, if the codec was
      fitted to another tree.
  """
  local_update = clients.local_update(loss_fn, client_optimizer)

  def compose(compressor):
    return rounds.federated_round(
      local_update,
      server_optimizer,
      channel=channel(compressor, representation),
      aggregate=aggregate,
      population=population,
      placement=placement,
    )

  return codec_state.with_codec(
    compose,
    coding=coding,
    population=population,
    volunteers=volunteers,
    placement=placement,
  )


def cg_fed_llm_products(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  *,
  coding: codec_state.Coding,
  population: int,
  representation: Representation = "delta",
  volunteers: Any = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FAF whose server averages the products of the decoded factors.

  The mean product is decomposed into factors of the adapter's rank, as in
  FlexLoRA. So there is no residual and no server optimizer. Arguments and
  errors are those of `cg_fed_llm`.
  """
  local_update = clients.local_update(loss_fn, client_optimizer)

  def compose(compressor):
    uplink = channel(compressor, representation)
    return product_aggregation.product_round(
      local_update,
      flex_lora.nearest_products,
      lambda trainable: channels.tiers_of(uplink),
      population=population,
      placement=placement,
    )

  return codec_state.with_codec(
    compose,
    coding=coding,
    population=population,
    volunteers=volunteers,
    placement=placement,
  )


def channel(
  compressor: base.Compressor, representation: Representation = "delta"
) -> channels.Channel:
  """Returns a channel that uploads the update, or the trained adapter.

  Raises:
    ValueError: if `representation` is neither "delta" nor "state", or the
      trained adapter would be sent by a compressor for updates, such as
      `error_feedback`.
  """
  if representation not in ("delta", "state"):
    raise ValueError(
      f"expected representation 'delta' or 'state', got {representation!r}."
    )
  if representation == "delta":
    return channels.Channel(upload=compressor)
  if compressor.for_updates:
    raise ValueError(
      "representation 'state' expected a compressor for parameters, got one for"
      " updates, such as error_feedback. Send updates: representation='delta'."
    )

  def upload(payload):
    # Both ends know what the client received and trained from.
    start = payload.values
    return compressor._replace(
      encode=lambda update, state, key: compressor.encode(
        start - update, state, key
      ),
      decode=lambda latent: start - compressor.decode(latent),
    )

  return channels.Channel(upload=upload)
