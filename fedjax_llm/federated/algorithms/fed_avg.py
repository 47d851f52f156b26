"""Federated averaging, and its variants with an adaptive server.

McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", 2017; Reddi et al., "Adaptive Federated Optimization",
2021 (arXiv 2003.00295). The method is the choice of the two optimizers:

  FedAvg      server `optax.sgd(1.0)`
  FedIT       FedAvg of LoRA's factors; `a` and `b` are averaged separately
              (Zhang et al., 2023, the code "Shepherd")
  FedAvgM     server `fed_avg_m(rate)`
  FedAdam     server `fed_adam(rate)`
  FedYogi     server `fed_yogi(rate)`
  FedAdagrad  server `fed_adagrad(rate)`
  FedProx     client `optax.chain(clients.proximal(mu), optax.sgd(rate))`

Any other optax optimizer serves as well. The adaptive ones here are the second
paper's Algorithm 2. They differ from optax's: no moment is corrected for its
bias, tau is added to the root and not under it, and the second moment starts at
tau**2.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.federated import aggregators, clients, rounds, schedules


def fed_avg(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  channel: rounds.AnyChannel | Mapping[int, rounds.AnyChannel] | None = None,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Local training, a mean of the updates, and a server step on the mean.

  The mean is weighted by the clients' numbers of examples, as in the first
  paper, unless `aggregate` says otherwise.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the mean update.
    channel: how messages are compressed, see `rounds.federated_round`; or a
      mapping from a round to the channel from that round on, with a channel for
      round 0. None for no compression.
    aggregate: turns the clients' updates into one; if not given, their mean,
      weighted by numbers of examples.
    population: the number of clients, if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.
  """

  def stage(channel):
    return rounds.federated_round(
      clients.local_update(loss_fn, client_optimizer),
      server_optimizer,
      channel=channel,
      aggregate=aggregate,
      population=population,
      placement=placement,
    )

  if isinstance(channel, Mapping):
    return schedules.staged({x: stage(each) for x, each in channel.items()})
  return stage(channel)


def fed_avg_m(
  learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.9
) -> optax.GradientTransformation:
  """The server of FedAvgM: momentum (Hsu et al., 2019, arXiv 1909.06335)."""
  return optax.sgd(learning_rate, momentum=momentum)


def fed_adagrad(
  learning_rate: optax.ScalarOrSchedule, *, b1: float = 0.0, tau: float = 1e-3
) -> optax.GradientTransformation:
  """The server of FedAdagrad: v grows by the squared update.

  Args:
    learning_rate: the server's rate, or a schedule of it.
    b1: the decay of the first moment, in [0, 1); the paper's experiments use 0.
    tau: the degree of adaptivity, positive.

  Raises:
    ValueError: if a number is out of range.
  """
  return _adaptive(learning_rate, lambda v, square: v + square, b1, 0.0, tau)


def fed_adam(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.99,
  tau: float = 1e-3,
) -> optax.GradientTransformation:
  """The server of FedAdam: v is the moving mean of the squared update.

  Args:
    learning_rate: the server's rate, or a schedule of it.
    b1: the decay of the first moment, in [0, 1).
    b2: the decay of the second moment, in [0, 1).
    tau: the degree of adaptivity, positive.

  Raises:
    ValueError: if a number is out of range.
  """
  grow = lambda v, square: b2 * v + (1 - b2) * square
  return _adaptive(learning_rate, grow, b1, b2, tau)


def fed_yogi(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.99,
  tau: float = 1e-3,
) -> optax.GradientTransformation:
  """The server of FedYogi: v moves towards u**2, by (1 - b2) u**2 a round.

  Args:
    learning_rate: the server's rate, or a schedule of it.
    b1: the decay of the first moment, in [0, 1).
    b2: the decay of the second moment, in [0, 1).
    tau: the degree of adaptivity, positive.

  Raises:
    ValueError: if a number is out of range.
  """
  grow = lambda v, square: v - (1 - b2) * square * jnp.sign(v - square)
  return _adaptive(learning_rate, grow, b1, b2, tau)


class AdaptiveState(NamedTuple):
  """The two moments of the updates."""

  first: Any
  second: Any


def _adaptive(
  learning_rate: optax.ScalarOrSchedule,
  grow: Callable[[Any, Any], Any],
  b1: float,
  b2: float,
  tau: float,
) -> optax.GradientTransformation:
  """Algorithm 2; `grow(v, squared update)` returns the next v."""
  if not (0 <= b1 < 1 and 0 <= b2 < 1 and tau > 0):
    raise ValueError(
      "an adaptive server expected b1 and b2 in [0, 1) and tau > 0, got"
      f" {b1=}, {b2=}, {tau=}."
    )

  def init_fn(params):
    full = lambda value: jax.tree.map(lambda x: jnp.full_like(x, value), params)
    return AdaptiveState(full(0), full(tau**2))

  def update_fn(updates, state, params=None):
    del params
    first = jax.tree.map(
      lambda m, x: b1 * m + (1 - b1) * x, state.first, updates
    )
    second = jax.tree.map(lambda v, x: grow(v, x**2), state.second, updates)
    steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), first, second)
    return steps, AdaptiveState(first, second)

  return optax.chain(
    optax.GradientTransformation(init_fn, update_fn),
    optax.scale_by_learning_rate(learning_rate),
  )
