"""Low-rank messages: a vector as a matrix, of which few ranks are sent."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.compression import base, quantize, wire


@wire.message(tag=16)
class LowRank:
  """The factors, [rows, rank] and [columns, rank], of a vector of `size`."""

  left: Any
  right: Any
  rank: int
  columns: int
  size: int

  def check(self) -> None:
    """Raises a ValueError if the factors are not of one vector."""
    if self.rank <= 0 or self.columns <= 0:
      raise ValueError(
        f"The message has rank {self.rank} of {self.columns} columns."
      )
    rows = -(-self.size // self.columns)
    wire.require(self.left, np.float32, rows * self.rank, "left")
    wire.require(self.right, np.float32, self.columns * self.rank, "right")

  @property
  def numbers(self) -> int:
    """How many numbers travel."""
    return self.left.size + self.right.size


def power_sgd(rank: int, *, columns: int | None = None) -> base.Compressor:
  """PowerSGD: one step of the power method, from where the last one ended.

  Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression
  for Distributed Optimization", 2019 (arXiv 1905.13727), algorithm 1: P = M Q,
  orthonormal, and Q = M^T P are sent. There workers average P before Q is made,
  which takes two messages a step; here each client's matrix has factors of its
  own, and the server averages what arrives. Exact if the matrix has no more
  than `rank` ranks. The paper has it under `base.error_feedback`.

  Args:
    rank: of what is sent, positive.
    columns: of the matrix that the vector is laid out as, row by row, with
      zeros at its end; None for about as many as rows. The paper takes each
      layer's matrix.

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
    # The same at all senders, as in the paper; any that is not degenerate.
    shape = width(vector.size), rank
    return jax.random.normal(jax.random.key(0), shape, jnp.float32)

  def encode(vector, state, key):
    del key  # Deterministic.
    rows = quantize.in_rows(vector.astype(jnp.float32), width(vector.size))
    # In units of the largest entry, or squares of what is small would be zero.
    largest = jnp.max(jnp.abs(rows))
    rows = rows / jnp.where(largest > 0, largest, 1)
    left = _orthonormal(_product(rows, state))
    right = _product(rows.T, left)
    payload = LowRank(
      left.ravel(),
      (right * largest).ravel(),
      rank,
      rows.shape[1],
      vector.size,
    )
    # From a column of zeros no step would lead away.
    is_alive = jnp.any(right != 0, axis=0)
    return payload, jnp.where(is_alive[None], right, state)

  def decode(payload):
    left = jnp.asarray(payload.left).reshape(-1, payload.rank)
    right = jnp.asarray(payload.right).reshape(-1, payload.rank)
    return _product(left, right.T).ravel()[: payload.size]

  return base.Compressor(init, encode, decode)


def _orthonormal(matrix: jax.Array) -> jax.Array:
  """Gram and Schmidt's columns, twice, for what the first pass leaves."""
  # Not `jnp.linalg.qr`: under vmap it can hang jaxlib 0.10 on a CPU.
  columns: list[jax.Array] = []
  for column in matrix.T:
    before = jnp.linalg.norm(column)
    for _ in range(2):
      for other in columns:
        column = column - _product(other, column) * other
    norm = jnp.linalg.norm(column)
    # Less is what rounding left, and has no direction of its own.
    is_new = norm > 1e-5 * before
    column = column / jnp.where(is_new, norm, 1)
    columns.append(jnp.where(is_new, column, 0))
  return jnp.stack(columns, axis=1)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
  # Accelerators would round factors to fewer bits.
  return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
