"""What arrives of the clients' updates: two cosines of every round.

A codec may have a small error and transmit nothing: a decoder that ignores its
message sends everyone's mean. The first cosine is of the mean, which the server
steps on; the second of what tells the clients from the mean, which such a
decoder loses. Only a simulation can tell them: it has both ends.

Each client adds sums, so that memory does not grow with the cohort.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

# What is left of a cohort's energy beside its mean is a difference of sums;
# below this share of them it is rounding.
_ROUNDING = 1e-5
# A mean innovation cosine below this is nothing: random projections to a 64th
# of the entries, which learn nothing, have 0.125.
TRANSMITS = 0.05
# So many rounds are looked at, the last ones.
_ROUNDS = 3


class Sums(NamedTuple):
  """Weighted sums over clients, of updates u and what arrives of them, r.

  Attributes:
    weight: of the weights.
    sent: of u, [n].
    arrived: of r, [n].
    energies: of u'u, r'r and u'r, [3].
  """

  weight: Any
  sent: Any
  arrived: Any
  energies: Any


def share(
  update: Float[Array, " n"],
  received: Float[Array, " n"],
  weight: Float[Array, ""],
) -> Sums:
  """What one client adds; zeros if its weight is zero."""
  weight = weight.astype(update.dtype)
  # Selected, because an absent client's update may be anything, even NaN.
  update, received = (jnp.where(weight > 0, x, 0) for x in (update, received))
  pairs = (update, update), (received, received), (update, received)
  energies = jnp.stack([jnp.sum(x * y) for x, y in pairs])
  return Sums(weight, weight * update, weight * received, weight * energies)


def cosines(total: Sums) -> dict[str, Float[Array, ""]]:
  """The metrics of a round, of the sum of its clients' shares.

  Returns:
    `update_cosine`, of the mean update and the mean of what arrived; and
    `innovation_cosine`, of how clients differ from these, over all of them:
    sum <u_i - mean u, r_i - mean r> / sqrt(sum |u_i - mean u|^2 sum |r_i -
    mean r|^2), each weighted as in the mean. Zero where there is nothing to
    compare: for the second, if there is one client, or all send or receive the
    same but for rounding.
  """
  weight = jnp.where(total.weight > 0, total.weight, 1)
  pairs = (
    (total.sent, total.sent),
    (total.arrived, total.arrived),
    (total.sent, total.arrived),
  )
  of_mean = jnp.stack([jnp.sum(x * (y / weight)) for x, y in pairs])
  own = total.energies - of_mean
  differs = (own[:2] > _ROUNDING * total.energies[:2]).all()
  return {
    "update_cosine": _cosine(of_mean, (of_mean[:2] > 0).all()),
    "innovation_cosine": _cosine(own, differs),
  }


def _cosine(energies, is_something):
  first, second, product = energies
  # Root by root: the product of two energies may be too small for float32.
  norms = jnp.sqrt(jnp.where(is_something, first, 1)) * jnp.sqrt(
    jnp.where(is_something, second, 1)
  )
  return jnp.where(is_something, product / norms, 0)


class Gate:
  """Says, once, that a codec transmits nothing of what is a client's own.

  That is if the mean innovation cosine of three rounds is below `TRANSMITS`.
  """

  def __init__(self, write: Callable[[str], None]):
    """Takes what writes a line for the user to read."""
    self._write = write
    self._cosines: list[float] = []
    self._has_spoken = False

  def see(self, innovation_cosine: Any) -> None:
    """Takes note of a round; None if it has no such cosine."""
    if innovation_cosine is None or self._has_spoken:
      return
    self._cosines = [*self._cosines, float(innovation_cosine)][-_ROUNDS:]
    mean = sum(self._cosines) / _ROUNDS
    if len(self._cosines) == _ROUNDS and mean < TRANSMITS:
      self._has_spoken = True
      self._write(
        f"warning: the innovation cosine of the last {_ROUNDS} rounds is"
        f" {mean:.3f}, below {TRANSMITS}: nothing arrives of what is a client's"
        " own, whatever the error of the codec is. If updates are not zero:"
        " send and record the delta, not the state; fit the input scale; take a"
        " linear head instead of tanh; record more updates; or take a transform"
        " code (codecs.transforms) or a trellis, which learn little or nothing."
      )
