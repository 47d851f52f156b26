"""Aggregators: from the decoded updates of a cohort to one update.

Each client adds a share, and shares add up, so that a mean over any number of
clients needs the memory of one update. A client of weight zero is not there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

State = Any


class Aggregator(NamedTuple):
  """A reduction over clients.

  Attributes:
    init: () -> its state before the first round, a tree of arrays; () if it
      has no memory.
    share: (update [n], weight, state) -> what one client adds, a tree.
    finish: (sum of the shares, state, key) -> one update [n], zeros if nobody
      was there, and the next state.
    steps_when_empty: whether the server steps in a round of nobody too, as
      privacy asks: that nobody was there must not show.
    noise_multiplier: standard deviation of the noise in the sum, in clip norms;
      None if updates are not clipped one by one, so that no privacy holds.
  """

  init: Callable[[], State]
  share: Callable[[Float[Array, " n"], Float[Array, ""], State], Any]
  finish: Callable[[Any, State, PRNGKeyArray], tuple[Float[Array, " n"], State]]
  steps_when_empty: bool = False
  noise_multiplier: float | None = None


def weighted_mean() -> Aggregator:
  """The mean weighted by the cohort's weights (FedAvg's n_i, for instance)."""

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
  """The plain mean, whatever the clients' weights, as FLASC takes it."""
  mean = weighted_mean()
  share = lambda update, weight, state: mean.share(
    update, jnp.sign(weight), state
  )
  return Aggregator(mean.init, share, mean.finish)


def sum_updates() -> Aggregator:
  """The plain sum, K times the mean, as CG-FedLLM's Algorithm 1 has it."""

  def share(update, weight, state):
    del state
    return jnp.where(weight > 0, update, 0)

  return Aggregator(lambda: (), share, lambda total, state, key: (total, state))


def mean_over_senders() -> Aggregator:
  """The mean of each entry over the clients that sent it, by their weights.

  For uploads that are parts: what a client did not send arrives as zero, and
  so is an entry that was sent as exactly zero taken for one that was not.
  """

  def share(update, weight, state):
    del state
    weight = weight.astype(update.dtype)
    is_sent = (weight > 0) & (update != 0)
    return jnp.where(is_sent, weight * update, 0), weight * is_sent

  def finish(total, state, key):
    del key  # Deterministic.
    update, weight = total
    return update / jnp.where(weight > 0, weight, 1), state

  return Aggregator(lambda: (), share, finish)
