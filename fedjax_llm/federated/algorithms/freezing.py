"""Methods that train some of the parameters: FFA-LoRA, RoLoRA, linear probing.

The mean of the clients' products `a @ b` is not the product of their mean
factors. With one factor the same at all clients it is: `a` times the mean of
their `b` is the mean of the products. So these methods aggregate exactly.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm.compression import base, sparse
from fedjax_llm.federated import (
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
  make: Callable[..., rounds.FederatedAlgorithm] = fed_avg.fed_avg,
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """FFA-LoRA: `a` stays at its random start, `b` is trained.

  Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning",
  2024 (arXiv 2403.12313). `a` is drawn from the experiment's seed and never
  sent; `b` and a head travel both ways.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: of the clients.
    server_optimizer: of the server; the paper averages: `optax.sgd(1.0)`.
    make: what is done with `b`: `flasc.flasc` for FLASC of it, for instance.
    **parts: the other arguments of `make`.

  Raises:
    ValueError: from `init`, if there is nothing but `a`.
  """
  return parameters.partial(
    make,
    loss_fn,
    client_optimizer,
    server_optimizer,
    is_trained=lambda path: parameters.factor(path) != "a",
    **parts,
  )


def linear_probe(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  make: Callable[..., rounds.FederatedAlgorithm] = fed_avg.fed_avg,
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """Linear probing: the head alone is trained and sent.

  Factors stay at their start, where their product is zero, so the base model is
  what it was.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: of the clients.
    server_optimizer: of the server.
    make: what is done with the head.
    **parts: the other arguments of `make`.

  Raises:
    ValueError: from `init`, if the model has no head.
  """
  algorithm = parameters.partial(
    make,
    loss_fn,
    client_optimizer,
    server_optimizer,
    is_trained=_is_head,
    **parts,
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
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """RoLoRA: a round trains `b`, the next one `a`, and so on.

  Chen, Guo, Ju, Dalal, Zhu, Khisti, "Robust Federated Finetuning of LLMs via
  Alternating Optimization of LoRA", 2025 (arXiv 2502.01755). `b` is first,
  because `a` has no gradient while `b` is zero. A head is trained every round.

  Clients upload what they trained, and download both factors. The paper counts
  one factor down too, that of the round before: its clients take part in all
  rounds and keep the other. Here they come and go and keep nothing.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: of the clients; starts afresh in every round.
    server_optimizer: of the server; has one state for each factor and one for
      the head, which wait while theirs are not trained. The paper averages:
      `optax.sgd(1.0)`.
    channel: what compresses the download, and the entries that are uploaded.
      The upload must have no memory: it is of other entries every round.
    **parts: `aggregate`, `population`, `placement` of `rounds.federated_round`.
  """
  # Without a chain of nothing, which would be a few bytes.
  compressed = channel is not None
  channel = channel or channels.Channel()
  local_update = clients.local_update(loss_fn, client_optimizer)

  def turn(trainable, waits):
    is_trained = lambda path: parameters.factor(path) != waits
    mask = _flat_mask(trainable, is_trained)

    def upload(payload):
      values = [channel.uplink(payload)] if compressed else []
      return base.chain(sparse.select(mask), *values)

    def trains(payload):
      return mask if channel.trains is None else mask & channel.trains(payload)

    return rounds.federated_round(
      local_update,
      _waiting(server_optimizer, waits),
      channel=channels.Channel(channel.download, upload, trains),
      **parts,
    )

  # Made of the tree at hand, because which entries are which depends on it.
  turns = lambda trainable: schedules.alternating(
    turn(trainable, "a"), turn(trainable, "b")
  )
  return rounds.FederatedAlgorithm(
    init=lambda trainable: turns(trainable).init(trainable),
    round=lambda state, *arguments: turns(state.trainable).round(
      state, *arguments
    ),
    received=lambda state, key: turns(state.trainable).received(state, key),
  )


def _flat_mask(tree: Any, is_chosen: Callable[[str], bool]) -> Any:
  """Which entries of the flat vector of `tree` are of chosen leaves."""
  pairs = zip(parameters.paths(tree), jax.tree.leaves(tree), strict=True)
  return np.concatenate(
    [np.full(np.size(x), is_chosen(path)) for path, x in pairs]
  )


def _waiting(
  optimizer: optax.GradientTransformation, waits: str
) -> optax.GradientTransformation:
  """Steps on all but one factor, whose parameters and state stay."""
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
