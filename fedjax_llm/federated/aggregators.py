"""Aggregators: functions from the decoded updates of a cohort to one update.

Only aggregators weight clients. A client's weight in a cohort is its number of
examples: `weighted_mean` uses it, `uniform_mean` counts every client once. Each
client computes a share, and the shares are added up, so a mean over any number
of clients needs the memory of one update. All aggregators leave out clients of
weight zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

State = Any


class Aggregator(NamedTuple):
  """A reduction over clients.

  Attributes:
    init: () -> the state before the first round, a tree of arrays; () if there
      is none.
    share: (update [n], weight, state) -> what one client adds, a tree.
    finish: (sum of the shares, state, key) -> one update [n], zeros if no
      client took part, and the next state.
    steps_when_empty: whether the server also steps in a round in which no
      client took part. Privacy needs it: nobody may see that all were absent.
    noise_multiplier: the standard deviation of the noise in the sum, in clip
      norms; None if updates are not clipped: then the mean is not private.
  """

  init: Callable[[], State]
  share: Callable[[Float[Array, " n"], Float[Array, ""], State], Any]
  finish: Callable[[Any, State, PRNGKeyArray], tuple[Float[Array, " n"], State]]
  steps_when_empty: bool = False
  noise_multiplier: float | None = None


def weighted_mean() -> Aggregator:
  """The mean weighted by the clients' numbers of examples, as in FedAvg."""

  def share(update, weight, state):
    del state
    weight = weight.astype(update.dtype)
    # Selected, because an absent client's update may be anything, even NaN.
    return jnp.where(weight > 0, weight * update, 0), weight

  def finish(total, state, key):
    del key  # Deterministic.
    update, weight = total
    return update / jnp.where(weight > 0, weight, 1), state

  return Aggregator(lambda: (), share, finish)


def uniform_mean() -> Aggregator:
  """The mean that counts every client once, as in FLASC."""
  mean = weighted_mean()
  return mean._replace(
    share=lambda update, weight, state: mean.share(
      update, jnp.sign(weight), state
    )
  )


def sum_updates() -> Aggregator:
  """The sum that counts every client once, as in CG-FedLLM's Algorithm 1."""

  def share(update, weight, state):
    del state
    return jnp.where(weight > 0, update, 0)

  return Aggregator(lambda: (), share, lambda total, state, key: (total, state))


def normalised(weights: Float[Array, " clients"]) -> Float[Array, " clients"]:
  """Divides the weights by their sum; zeros stay zeros."""
  return weights / jnp.where(weights.sum() > 0, weights.sum(), 1)


def weighted_sum(trees: Any, weights: Float[Array, " clients"]) -> Any:
  """Adds up trees [clients, ...], each multiplied by its weight."""
  return jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), trees)
