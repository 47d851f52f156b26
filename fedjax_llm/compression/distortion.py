"""Two cosines that measure how much of many senders' vectors arrives.

A compressor can have a small squared error and transmit nothing: its decoder
can ignore the message and return the mean of all senders. The update cosine
compares the mean that was sent with the mean that arrived, which the server
applies. The innovation cosine compares the senders' differences from their
mean; it is 0 for that decoder.

Each sender adds one `Sums`, so memory does not grow with the number of senders.
Only a simulation can compute the cosines, because it sees both ends.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

# The energy of the innovations is a difference of sums. Below this fraction of
# the sums it is only rounding error.
_ROUNDING = 1e-5


class Sums(NamedTuple):
  """Weighted sums over senders i of sent vectors u_i and received ones, r_i.

  Attributes:
    weight: sum of the weights w_i.
    sent: sum of w_i u_i, [n].
    arrived: sum of w_i r_i, [n].
    energies: sums of w_i <u_i, u_i>, w_i <r_i, r_i> and w_i <u_i, r_i>, [3].
  """

  weight: Any
  sent: Any
  arrived: Any
  energies: Any


def share(
  vector: Float[Array, " n"],
  received: Float[Array, " n"],
  weight: Float[Array, ""],
) -> Sums:
  """Returns what one sender adds to the sums; zeros if its weight is zero."""
  weight = weight.astype(vector.dtype)
  # Selected, not multiplied: the vector of an absent sender may be NaN.
  vector, received = (jnp.where(weight > 0, x, 0) for x in (vector, received))
  energies = weight * _energies(vector, received)
  return Sums(weight, weight * vector, weight * received, energies)


def cosines(total: Sums) -> dict[str, Float[Array, ""]]:
  """Returns both cosines.

  Let p_i be the weights divided by their sum, and let U = sum p_i u_i and
  R = sum p_i r_i be the means.

    update_cosine      <U, R> / (|U| |R|)
    innovation_cosine  sum p_i <u_i - U, r_i - R>
                       / sqrt(sum p_i |u_i - U|^2  sum p_i |r_i - R|^2)

  The innovation cosine is one cosine of all innovations together, not the mean
  of one cosine for each sender. In that mean, a sender that hardly differs from
  the others would weigh as much as one that differs a lot, although its
  direction is mostly noise. That mean also needs all vectors at once. This
  cosine weights each sender by its energy, as the squared error does:
  1 - cosine^2 is the relative squared error of the innovations after the best
  common scaling of r_i - R.

  Args:
    total: the sum of the shares of all senders.

  Returns:
    The two cosines. A cosine is 0 if there is nothing to compare. The
    innovation cosine is 0 if there is only one sender, or if the sent vectors,
    or the received ones, are all equal up to rounding.
  """
  weight = jnp.where(total.weight > 0, total.weight, 1)
  of_mean = _energies(total.sent, total.arrived, weight)
  own = total.energies - of_mean
  differs = (own[:2] > _ROUNDING * total.energies[:2]).all()
  return {
    "update_cosine": _cosine(of_mean, (of_mean[:2] > 0).all()),
    "innovation_cosine": _cosine(own, differs),
  }


def _energies(sent, arrived, divisor=1):
  """<sent, sent>, <arrived, arrived> and <sent, arrived>, over `divisor`."""
  pairs = (sent, sent), (arrived, arrived), (sent, arrived)
  return jnp.stack([jnp.sum(x * (y / divisor)) for x, y in pairs])


def _cosine(energies, is_something):
  *squares, product = energies
  # Root by root: the product of two energies may be too small for float32.
  roots = [jnp.sqrt(jnp.where(is_something, x, 1)) for x in squares]
  norms = roots[0] * roots[1]
  return jnp.where(is_something, product / norms, 0)
