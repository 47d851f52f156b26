"""Bits where they count: entries of known variance, each at a rate of its own.

Reverse water-filling: the squared error of independent Gaussians is least, for
so many bits in all, if it is the same for each, but for those whose variance is
less than that, which are not sent (Cover and Thomas, "Elements of Information
Theory", 2006, section 10.3.3). Here entries of one rate are a class, and each
class is sent by a trellis that knows their profile.
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
) -> Float[np.ndarray, " n"]:
  """The rate of each entry, by which the squared error is least.

  Each entry takes the rate of least `variance / 4**rate + price * bits`, at the
  lowest price that so many bits can pay.

  Args:
    variances: of the entries, above zero.
    bits: that entries may take on average, above zero.
    choices: what rates there are, 0 among them.
    extra: bits that an entry takes beside its rate, unless that is 0.
  """
  offered = np.asarray(choices)
  taken = offered + extra * (offered > 0)
  variances = np.asarray(variances, np.float64)
  variances = variances / variances.max()

  def chosen(price):
    cost = variances[:, None] / 4**offered + price * taken
    return np.argmin(cost, axis=1)

  # At the highest nobody buys, as no bit takes away so much.
  low, high = 1e-30, 2 * np.log(4)
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
) -> base.Compressor:
  """Sends entries whose variances both ends know, at rates that suit them.

  Variances may be in any unit: what the message itself is like is told by the
  scales of its blocks, each of which holds entries from all over its class.

  Args:
    variances: of the entries, above zero and known when this is called.
    bits: of an entry, on average and all included: a message is no longer.
    memory: of the trellises, 6 or more, see `trellis`.
    block: how many entries share a scale.

  Returns:
    A `Compressor` whose payload is of `Classes`.

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
  left = bits - 8 * _HEADER * (len(RATES) - 1) / size
  rate = (
    rates(variances, left, extra=16 / block) if left > 0 else np.zeros(size)
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
        float(each), memory=memory, block=block, profile=profile[entries]
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
