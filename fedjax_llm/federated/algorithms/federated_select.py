"""Federated Select: clients receive, train and send a part of the model.

Charles et al., "Federated Select: A Primitive for Communication- and
Memory-Efficient Federated Learning", 2022 (arXiv 2208.09432), as FLASC's
authors have it for LoRA: every round the server sends the Top-K of the
trainable parameters, and clients train nothing else.
"""

from typing import Any

import optax

from fedjax_llm.compression import base, sparse
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  densities,
  rounds,
  schedules,
)
from fedjax_llm.federated.algorithms import fed_avg


def federated_select(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  density: densities.Density,
  warm_up_rounds: int = 1,
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """Federated Select, unstructured: the Top-K of the round, trained alone.

  Without a dense round before, as in the authors' code, LoRA can be stuck for
  ever: `b` is zero at the start, so a Top-K that `a` and a head fill has none
  of it; what was not received is not trained, so `b` stays zero; and as long as
  it is, `a` has no gradient. Then a head is all that learns. One dense round,
  the default, which SparseAdapter has as well, sets `b` free if it leaves some
  of it among the largest parameters: `b` must have moved far enough.

  The support travels down; what comes back is of the same support, so values
  alone travel up.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    density: share of the parameters that is sent, in (0, 1]; or such shares by
      the round they begin with, from 0 on, counted without the warm-up.
    warm_up_rounds: how many rounds are dense at first; 0 for the authors' code.
    **parts: `aggregate` (the uniform mean unless told otherwise), `population`,
      `clients_per_step`, `mesh` of `rounds.federated_round`.

  Raises:
    ValueError: if a density or `warm_up_rounds` is out of range.
  """
  if warm_up_rounds < 0:
    raise ValueError(f"expected {warm_up_rounds=} to be 0 or more.")
  parts = {"aggregate": aggregators.uniform_mean()} | parts
  stages = {
    warm_up_rounds + begin: share
    for begin, (share,) in densities.stages(density).items()
  }
  return schedules.staged(
    {
      begin: fed_avg.fed_avg(
        loss_fn,
        client_optimizer,
        server_optimizer,
        channel=_channel(share),
        **parts,
      )
      for begin, share in ({0: 1.0} | stages).items()
    }
  )


def _channel(density):
  if density == 1:
    return channels.Channel()
  return received_alone(sparse.top_k(density))


def received_alone(download: base.Compressor) -> channels.Channel:
  """Clients train and send what they received: its support is known above.

  Args:
    download: of payloads such as those of `sparse.top_k`.
  """
  return channels.Channel(
    download=download,
    upload=lambda payload: sparse.select(
      sparse.support(payload), payload.values.size
    ),
    trains=sparse.support,
  )
