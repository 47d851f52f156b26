"""Bits where they count: entries of known variance, each at a rate of its own.

Reverse water-filling: the squared error of independent Gaussians is least, for
so many bits in all, if it is the same for each, but for those whose variance is
less than that, which are not sent (Cover and Thomas, "Elements of Information
Theory", 2006, section 10.3.3). Such a code shortens what it sends, each entry
by a share of its own, and the mean of many is as short as each of them.

Unbiased, all entries are sent. What arrives of a Gaussian at a rate R is 1 -
4**-R of it, on average, and is divided by that: an error of its variance over
4**R - 1, which shrinks in a mean, and whose sum over entries is made least.

Here entries of one rate are a class, and each class is sent by a trellis that
knows their profile.
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
# Unbiased, everything is sent.
_RATES_OF_ALL = (1 / 8, *RATES[1:])
# Above the bytes that a class takes for its header, and for a scale more.
_HEADER = 24


@wire.message(tag=21)
class Classes:
  """The payloads of one class and of the rest, apart."""

  first: Any
  rest: Any

  @property
  def size(self) -> int:
    """How many entries they decode to."""
    return self.first.size + self.rest.size


def rates(
  variances: Float[np.ndarray, " n"],
  bits: float,
  *,
  choices: Sequence[float] = RATES,
  extra: float = 0.0,
  unbiased: bool = False,
) -> Float[np.ndarray, " n"]:
  """The rate of each entry, by which the squared error is least.

  Each entry takes the rate of least `error + price * bits`, at the lowest price
  that so many bits can pay.

  Args:
    variances: of the entries, above zero.
    bits: that entries may take on average, above zero.
    choices: what rates there are, ascending. The first must be 0, or unbiased
      above it, and affordable to all.
    extra: bits that an entry takes beside its rate, unless that is 0.
    unbiased: whether errors are `variance / (4**rate - 1)`, of what is
      unbiased, or `variance / 4**rate`.
  """
  offered = np.asarray(choices, np.float64)
  taken = offered + extra * (offered > 0)
  error = 1 / (4**offered - 1) if unbiased else 4**-offered
  variances = np.asarray(variances, np.float64)
  variances = variances / variances.max()

  def chosen(price):
    return np.argmin(variances[:, None] * error + price * taken, axis=1)

  # At the highest nobody buys, as no bit takes away so much.
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
  block: int = 2048,
  unbiased: bool = False,
) -> base.Compressor:
  """Sends entries whose variances both ends know, at rates that suit them.

  Variances may be in any unit: what the message itself is like is told by the
  scales of its blocks, each of which holds entries from all over its class.

  Args:
    variances: of the entries, above zero and known when this is called.
    bits: of an entry, on average and all included: a message is no longer.
    memory: of the trellises, 6 or more, see `trellis`.
    block: how many entries share a scale.
    unbiased: see `trellis`; and bits go where the error is then least. Nothing
      is left out, so an eighth of a bit is the least.

  Returns:
    A `Compressor` whose payload is of `Classes`, or of the trellis alone if
    all entries have one rate.

  Raises:
    ValueError: if a variance is not above zero, or so few bits do not pay for
      the headers of the classes.
  """
  variances = np.asarray(variances, np.float64)
  if not (variances > 0).all() or not np.isfinite(variances).all():
    raise ValueError(
      "allocated expected finite variances above zero. Add a little to those"
      " that are zero."
    )
  size = variances.size
  choices = _RATES_OF_ALL if unbiased else RATES
  left = bits - 8 * _HEADER * np.count_nonzero(choices) / size
  extra = 16 / block
  rate = np.zeros(size)
  if left > choices[0] + extra * unbiased:
    rate = rates(
      variances, left, choices=choices, extra=extra, unbiased=unbiased
    )
  if not rate.any():
    raise ValueError(
      f"{bits=} of {size} entries do not pay for the headers and scales. Give"
      " more, or send so short a vector by one trellis."
    )
  # So that neighbours are not alike, and a search has what to choose between.
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
        block=block,
        profile=profile[entries],
        unbiased=unbiased,
      )
    )

  def encode(vector, key):
    if vector.shape != (size,):
      raise ValueError(
        f"the variances are of vectors of {size} entries, got {vector.shape}."
      )
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
