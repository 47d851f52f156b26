"""Low-rank messages: a vector as a matrix, sent as two thin factors."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.compression import base, quantize, wire

# By default, accelerators multiply in lower precision.
_product = functools.partial(jnp.matmul, precision="highest")


@wire.message(tag=16)
class LowRank:
  """Two factors, [rows, rank] and [columns, rank], for `size` entries."""

  left: Any
  right: Any
  rank: int
  columns: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if the factors do not fit the size."""
    if self.rank <= 0 or self.columns <= 0:
      raise ValueError(
        f"The message has rank {self.rank} and {self.columns} columns."
      )
    rows = -(-self.size // self.columns)
    wire.require(self.left, np.float32, rows * self.rank, "left")
    wire.require(self.right, np.float32, self.columns * self.rank, "right")

  @property
  def numbers(self) -> int:
    """The number of values that travel."""
    return self.left.size + self.right.size


def power_sgd(rank: int, *, columns: int | None = None) -> base.Compressor:
  """PowerSGD: one step of the power method in every message.

  Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression
  for Distributed Optimization", 2019 (arXiv 1905.13727), algorithm 1. It sends
  P, which is M Q with orthonormal columns, and Q = M^T P. The next message
  starts from this Q. In the paper, workers average P before they compute Q,
  which takes two messages per step. Here every client sends its own factors,
  and the server averages the decoded vectors. A matrix of rank `rank` or less
  arrives exactly. The paper uses PowerSGD with `base.error_feedback`.

  Args:
    rank: the rank that is sent, positive.
    columns: the number of columns of the matrix M. The vector fills it row by
      row, with zeros at the end. None for a matrix that is about square. The
      paper uses each layer's own matrix.

  Returns:
    A `Compressor` whose payload is a `LowRank` and whose state is Q.

  Raises:
    ValueError: if `rank` or `columns` is not positive.
  """
  if rank <= 0 or (columns is not None and columns <= 0):
    raise ValueError(
      f"power_sgd expected rank > 0 and columns > 0, got {rank=}, {columns=}."
    )

  width = lambda size: columns or math.isqrt(size)

  def init(vector):
    # All senders start from the same Q, as in the paper.
    shape = width(vector.size), rank
    return jax.random.normal(jax.random.key(0), shape, jnp.float32)

  def encode(vector, state, key):
    del key  # Deterministic.
    rows = quantize.in_rows(vector.astype(jnp.float32), width(vector.size))
    # In units of the largest entry: squares of small ones would underflow.
    largest = jnp.max(jnp.abs(rows))
    rows = rows / quantize.divisor(largest)
    left = _orthonormal(_product(rows, state))
    right = _product(rows.T, left)
    factors = left.ravel(), (right * largest).ravel()
    payload = LowRank(*factors, rank, rows.shape[1], vector.size)
    # A column of zeros would stay zero, so the old column replaces it.
    is_alive = jnp.any(right != 0, axis=0)
    return payload, jnp.where(is_alive[None], right, state)

  def decode(payload):
    left = jnp.asarray(payload.left).reshape(-1, payload.rank)
    right = jnp.asarray(payload.right).reshape(-1, payload.rank)
    return _product(left, right.T).ravel()[: payload.size]

  return base.Compressor(init, encode, decode)


def _orthonormal(matrix: jax.Array) -> jax.Array:
  """Makes columns orthonormal: Gram-Schmidt, twice to limit rounding error."""
  # Not `jnp.linalg.qr`: under vmap it can hang jaxlib 0.10 on a CPU.
  columns: list[jax.Array] = []
  for column in matrix.T:
    before = jnp.linalg.norm(column)
    for _ in range(2):
      for other in columns:
        column = column - _product(other, column) * other
    norm = jnp.linalg.norm(column)
    # A shorter column is only rounding error, so it becomes zero.
    is_new = norm > 1e-5 * before
    column = column / jnp.where(is_new, norm, 1)
    columns.append(jnp.where(is_new, column, 0))
  return jnp.stack(columns, axis=1)
