"""Allocates bits to entries of known variance: more bits to larger variances.

For independent Gaussians and a given number of bits, reverse water-filling has
the least squared error (Cover and Thomas, "Elements of Information Theory",
2006, section 10.3.3). All entries that are sent have the same error. Entries
whose variance is smaller than this error are not sent. At rate R the decoded
entry is on average 1 - 4**-R times the entry. A mean over clients is too small
by the same factor.

The unbiased code sends every entry and divides the decoded entry by 1 - 4**-R.
Its error, variance / (4**R - 1), is larger, but averages out in a mean.

Entries with the same rate form a class. Each class is coded by a trellis whose
profile is the standard deviations of the entries.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fedjax_llm import compression
from fedjax_llm.compression import base, wire

RATES = (0, 1 / 4, 1 / 2, 1, 2, 3, 4, 6)
# An unbiased code sends every entry.
_RATES_OF_ALL = (1 / 8, *RATES[1:])
# Number of entries that share a bfloat16 scale.
_BLOCK = 2048
# Upper bound on the bytes of a class's header and of its last block's scale.
_HEADER = 24


@wire.message(tag=21)
class Classes:
  """The payload of one class, and the payloads of the other classes."""

  first: Any
  rest: Any

  @property
  def size(self) -> int:
    """The number of entries in all classes."""
    return self.first.size + self.rest.size


def rates(
  variances: Float[np.ndarray, " n"],
  bits: float,
  *,
  choices: Sequence[float] = RATES,
  extra: float = 0.0,
  unbiased: bool = False,
) -> Float[np.ndarray, " n"]:
  """Returns the rates of entries that minimise the total squared error.

  Each entry takes the rate with the least `error + price * bits`. The price is
  the lowest one at which the mean number of bits is at most `bits`.

  Args:
    variances: variance of each entry, positive.
    bits: mean number of bits per entry, positive.
    choices: available rates in bits per entry, ascending. The first must be 0.
      If unbiased, the first must be in (0, `bits - extra`].
    extra: bits that an entry costs in addition to its rate; none at rate 0.
    unbiased: whether the error of an entry is `variance / (4**rate - 1)`
      instead of `variance / 4**rate`.
  """
  offered = np.asarray(choices, np.float64)
  taken = offered + extra * (offered > 0)
  error = 1 / (4**offered - 1) if unbiased else 4**-offered
  variances = np.asarray(variances, np.float64)
  variances = variances / variances.max()

  def chosen(price):
    return np.argmin(variances[:, None] * error + price * taken, axis=1)

  # At the highest price every entry takes the first rate: no bit is worth it.
  low, high = 1e-30, 2 * np.max(-np.diff(error) / np.diff(taken))
  for _ in range(100):
    price = np.sqrt(low * high)
    if taken[chosen(price)].mean() > bits:
      low = price
    else:
      high = price
  return offered[chosen(high)]


def allocated(
  variances: Float[np.ndarray, " n"],
  bits: float,
  *,
  memory: int = 12,
  unbiased: bool = False,
) -> base.Compressor:
  """Sends entries whose variances both ends know: more bits to larger ones.

  Only ratios of variances matter, because each block is sent with a scale. A
  block has random entries of its class.

  Args:
    variances: variance of each entry, positive; concrete, not traced.
    bits: upper bound on the length of a message in bits per entry, headers and
      scales included.
    memory: memory of the trellises, 6 or more, see `trellis`.
    unbiased: whether the code is unbiased, see `trellis`. If so, every entry is
      sent, with at least 1/8 bit.

  Returns:
    A `Compressor` whose payload is nested `Classes`, or the payload of one
    trellis if all entries have the same rate.

  Raises:
    ValueError: if a variance is not positive, or `bits` is too small for the
      headers of the classes.
  """
  variances = np.asarray(variances, np.float64)
  if not (variances > 0).all() or not np.isfinite(variances).all():
    raise ValueError(
      "allocated expected finite variances above zero, got values in"
      f" [{variances.min()}, {variances.max()}]. Add a small number to those"
      " that are zero."
    )
  size = variances.size
  choices = _RATES_OF_ALL if unbiased else RATES
  left = bits - 8 * _HEADER * np.count_nonzero(choices) / size
  extra = 16 / _BLOCK
  rate = np.zeros(size)
  if left > choices[0] + extra * unbiased:
    rate = rates(
      variances, left, choices=choices, extra=extra, unbiased=unbiased
    )
  if not rate.any():
    raise ValueError(
      f"allocated expected more bits: {bits=} for each of {size} entries is not"
      " enough for headers and scales. Give more bits, or use `trellis` for a"
      " vector this short."
    )
  # Shuffled, so that neighbours in a trellis are independent.
  order = np.random.RandomState(0).permutation(size)
  profile = np.sqrt(variances)
  members, parts = [], []
  for each in np.unique(rate[rate > 0]):
    entries = order[rate[order] == each]
    members.append(entries)
    parts.append(
      compression.trellis(
        float(each),
        memory=memory,
        block=_BLOCK,
        profile=profile[entries],
        unbiased=unbiased,
      )
    )

  def encode(vector, key):
    base.require_size("allocated", vector, size, "One for each variance.")
    payloads = [
      part.encode(vector[entries], (), key)[0]
      for part, entries in zip(parts, members, strict=True)
    ]
    return functools.reduce(lambda rest, x: Classes(x, rest), payloads[::-1])

  def decode(payload):
    vector, payloads = jnp.zeros(size), []
    for _ in parts[1:]:
      payloads.append(payload.first)
      payload = payload.rest
    payloads.append(payload)
    for part, entries, each in zip(parts, members, payloads, strict=True):
      vector = vector.at[entries].set(part.decode(each), unique_indices=True)
    return vector

  return base.stateless(encode, decode)
