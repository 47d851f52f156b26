"""Federated averaging and its adaptive kin.

McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", 2017; Reddi et al., "Adaptive Federated Optimization",
2021. The method is the choice of the two optimizers:

  FedAvg      server `optax.sgd(1.0)`
  FedAvgM     server `optax.sgd(rate, momentum=0.9)`
  FedAdam     server `optax.adam(rate, b2=0.99, eps=1e-3)`
  FedYogi     server `optax.yogi(rate, b2=0.99, eps=1e-3)`
  FedAdagrad  server `optax.adagrad(rate, initial_accumulator_value=1e-6)`
  FedProx     client `optax.chain(clients.proximal(mu), optax.sgd(rate))`

optax's adaptive optimizers differ in details from the second paper's: adam and
yogi correct the bias of their moments, adagrad adds epsilon under the root.
"""

from typing import Any

import optax

from fedjax_llm.federated import clients, rounds


def fed_avg(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """Local training, a mean of the updates, a server step on it.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean update.
    **parts: `channel`, `aggregate`, `population`, `clients_per_step`, `mesh` of
      `rounds.federated_round`.
  """
  local_update = clients.local_update(loss_fn, client_optimizer)
  return rounds.federated_round(local_update, server_optimizer, **parts)
