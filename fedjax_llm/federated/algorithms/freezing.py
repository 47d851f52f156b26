"""Methods that train some of the parameters: FFA-LoRA, RoLoRA, linear probing.

The mean of the clients' products `a @ b` is not the product of their mean
factors. But if all clients have the same `a`, the mean of the products is `a`
times the mean of their `b`. So these methods aggregate exactly.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, sparse
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  parameters,
  rounds,
  schedules,
)
from fedjax_llm.federated.algorithms import fed_avg


def ffa_lora(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  make: parameters.Averaging = fed_avg.fed_avg,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """FFA-LoRA: `a` stays at its random start, `b` is trained.

  Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning",
  2024 (arXiv 2403.12313). `a` is drawn from the experiment's seed and never
  sent; `b` and a head travel both ways.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer.
    server_optimizer: the server's; the paper averages: `optax.sgd(1.0)`.
    make: the algorithm that trains `b`. For FLASC of `b`, for instance,
      `functools.partial(flasc.flasc, download_density=0.25,
      upload_density=0.25)`.
    aggregate: turns the clients' updates into one; the default of `make` if not
      given.
    population: the number of clients, if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: from `init`, if all parameters are `a` factors.
  """
  return parameters.partial(
    lambda of_trained: make(
      of_trained,
      client_optimizer,
      server_optimizer,
      aggregate=aggregate,
      population=population,
      placement=placement,
    ),
    loss_fn,
    is_trained=lambda path: parameters.factor(path) != "a",
  )


def linear_probe(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  make: parameters.Averaging = fed_avg.fed_avg,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Linear probing: only the head is trained and sent.

  The factors stay at their start, where their product is zero, so the base
  model does not change.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer.
    server_optimizer: the server's optimizer.
    make: the algorithm that trains the head, see `ffa_lora`.
    aggregate: turns the clients' updates into one; the default of `make` if not
      given.
    population: the number of clients, if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: from `init`, if the model has no head.
  """
  algorithm = parameters.partial(
    lambda of_trained: make(
      of_trained,
      client_optimizer,
      server_optimizer,
      aggregate=aggregate,
      population=population,
      placement=placement,
    ),
    loss_fn,
    is_trained=_is_head,
  )

  def init(trainable):
    names = parameters.paths(trainable)
    if not any(map(_is_head, names)):
      raise ValueError(
        "linear_probe trains a head, but there are only factors:"
        f" {', '.join(names)}. A language model has none; take a classifier,"
        " such as that of tasks.classifier."
      )
    return algorithm.init(trainable)

  return algorithm._replace(init=init)


def _is_head(path: str) -> bool:
  return parameters.factor(path) is None


def ro_lora(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  channel: channels.Channel | None = None,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """RoLoRA: rounds train `b` and `a` in turn.

  Chen, Guo, Ju, Dalal, Zhu, Khisti, "Robust Federated Finetuning of LLMs via
  Alternating Optimization of LoRA", 2025 (arXiv 2502.01755). `b` is first,
  because `a` has no gradient while `b` is zero. A head is trained every round.

  Clients upload what they trained, and download both factors. In the paper all
  clients take part in every round and keep the other factor, so they download
  only the one trained last. Here clients may miss rounds, and keep nothing.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: the server's; it has one state for each factor and one for
      the head. A factor's state changes only in rounds that train the factor.
      The paper averages: `optax.sgd(1.0)`.
    channel: how downloads are compressed, and the entries that are uploaded.
      Its upload must have no memory, because every round sends other entries.
    aggregate: turns the clients' updates into one; if not given, their mean,
      weighted by numbers of examples.
    population: the number of clients, which this method does not need.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: from `init`, if the upload has a memory.
  """
  local_update = clients.local_update(loss_fn, client_optimizer)

  def turn(waits):
    return rounds.federated_round(
      local_update,
      _waiting(server_optimizer, waits),
      channel=functools.partial(_without, waits, channel),
      aggregate=aggregate,
      population=population,
      placement=placement,
    )

  algorithm = schedules.alternating(turn("a"), turn("b"))

  def init(trainable):
    _refuse_memory(_without("a", channel, trainable), trainable)
    return algorithm.init(trainable)

  return algorithm._replace(init=init)


def _without(
  waits: str, channel: channels.Channel | None, trainable: Any
) -> channels.Channel:
  """Returns the channel of a round that does not train the factor `waits`."""
  mask = parameters.owners(trainable) != ("a", "b").index(waits)
  chosen = sparse.select(mask)
  if channel is None:
    return channels.Channel(upload=chosen, trains=lambda payload: mask)
  trains = channel.trains or (lambda payload: True)
  return channels.Channel(
    channel.download,
    upload=lambda payload: base.chain(chosen, channel.uplink(payload)),
    trains=lambda payload: mask & trains(payload),
  )


def _refuse_memory(channel, trainable):
  """Refuses an upload that keeps a state from one round to the next."""
  vector, _ = ravel_pytree(trainable)
  states = functools.partial(channels.upload_states, channel, population=1)
  if jax.tree.leaves(jax.eval_shape(states, vector)):
    raise ValueError(
      "ro_lora expected an upload without memory, got one that keeps a state"
      " for each client: `a` and `b` take turns, so what was left of one would"
      " be added to the other. Take it out of error_feedback or similar, or"
      " train both factors with fed_avg."
    )


def _waiting(
  optimizer: optax.GradientTransformation, waits: str
) -> optax.GradientTransformation:
  """Steps on all but the factor `waits`, whose state does not change either."""
  kinds = ("a", "b", None)

  def of(kind, tree):
    return parameters.split(tree, lambda path: parameters.factor(path) == kind)[
      0
    ]

  def init(params):
    return tuple(optimizer.init(of(kind, params)) for kind in kinds)

  def update(updates, state, params=None):
    result, after = jax.tree.map(jnp.zeros_like, updates), []
    for kind, own in zip(kinds, state, strict=True):
      if kind != waits:
        step, own = optimizer.update(of(kind, updates), own, of(kind, params))
        result = parameters.combine(step, result)
      after.append(own)
    return result, tuple(after)

  return optax.GradientTransformation(init, update)
