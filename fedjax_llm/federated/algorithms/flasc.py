"""FLASC: federated LoRA with sparse messages and dense local training.

Kuo, Raje, Rajesh, Smith, "Federated LoRA with Sparse Communication", 2024
(arXiv 2406.05233). The server sends the Top-K of the trainable parameters,
one global selection over all of them; clients start from it, zeros elsewhere,
train every entry, and answer with the Top-K of their update, each its own.
"""

from typing import Any

import optax

from fedjax_llm.compression import sparse
from fedjax_llm.federated import aggregators, channels, clients, rounds
from fedjax_llm.federated.algorithms import fed_avg


def flasc(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  download_density: float,
  upload_density: float,
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """FLASC (Algorithm 1); with both densities 1, dense federated LoRA.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the authors use `optax.sgd(rate, momentum=0.9)`.
    server_optimizer: the authors use `server_adamw`.
    download_density: share of the parameters that is sent, in (0, 1].
    upload_density: share of an update that is sent, in (0, 1].
    **parts: `population`, `clients_per_step`, `mesh` of
      `rounds.federated_round`.

  Raises:
    ValueError: if a density is out of range.
  """
  channel = channels.Channel(
    download=sparse.top_k(download_density), upload=sparse.top_k(upload_density)
  )
  return fed_avg.fed_avg(
    loss_fn,
    client_optimizer,
    server_optimizer,
    channel=channel,
    aggregate=aggregators.uniform_mean(),
    **parts,
  )


def server_adamw(
  learning_rate: float, weight_decay: float = 0.01
) -> optax.GradientTransformation:
  """The server optimizer of the authors' code, which the paper calls FedAdam.

  It is torch's AdamW with its defaults; optax's default decay is 1e-4.
  """
  return optax.adamw(learning_rate, weight_decay=weight_decay)
