"""Aggregators: from the decoded updates of a cohort to one update.

Each client adds a share, and shares add up, so that a mean over any number of
clients needs the memory of one update. A client of weight zero is not there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Aggregator(NamedTuple):
  """A reduction over clients.

  Attributes:
    share: (update [n], weight) -> what one client adds, a tree.
    finish: sum of the shares -> one update [n]; zeros if nobody was there.
  """

  share: Callable[[Float[Array, " n"], Float[Array, ""]], Any]
  finish: Callable[[Any], Float[Array, " n"]]


def weighted_mean() -> Aggregator:
  """The mean weighted by the cohort's weights (FedAvg's n_i, for instance)."""

  def share(update, weight):
    weight = weight.astype(update.dtype)
    # Selected, because an absent client's update may be anything, even NaN.
    return jnp.where(weight > 0, weight * update, 0), weight

  def finish(total):
    update, weight = total
    return update / jnp.where(weight > 0, weight, 1)

  return Aggregator(share, finish)


def uniform_mean() -> Aggregator:
  """The plain mean, whatever the clients' weights, as FLASC takes it."""
  mean = weighted_mean()
  share = lambda update, weight: mean.share(update, jnp.sign(weight))
  return Aggregator(share, mean.finish)
