"""Low-rank messages: a vector as a matrix, of which few ranks are sent."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.compression import base, wire


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
    wire.require(self.left, self.left.dtype, rows * self.rank, "left")
    wire.require(self.right, self.left.dtype, self.columns * self.rank, "right")


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

  def matrix(vector):
    width = columns or math.isqrt(vector.size)
    padded = jnp.pad(vector, (0, -vector.size % width))
    return padded.reshape(-1, width)

  def init(vector):
    width = columns or math.isqrt(vector.size)
    # The same at all senders, as in the paper; any that is not degenerate.
    return jax.random.normal(jax.random.key(0), (width, rank), vector.dtype)

  def encode(vector, state, key):
    del key  # Deterministic.
    rows = matrix(vector)
    left = _orthonormal(rows @ state)
    right = rows.T @ left
    payload = LowRank(
      left.ravel(), right.ravel(), rank, rows.shape[1], vector.size
    )
    # A zero matrix leaves nothing to start from.
    return payload, jnp.where(jnp.any(right != 0), right, state)

  def decode(payload):
    left = jnp.asarray(payload.left).reshape(-1, payload.rank)
    right = jnp.asarray(payload.right).reshape(-1, payload.rank)
    return (left @ right.T).ravel()[: payload.size]

  return base.Compressor(init, encode, decode)


def _orthonormal(matrix: jax.Array) -> jax.Array:
  """Gram and Schmidt's columns, twice, for what the first pass leaves."""
  columns: list[jax.Array] = []
  for column in matrix.T:
    for _ in range(2):
      for other in columns:
        column = column - jnp.vdot(other, column) * other
    norm = jnp.linalg.norm(column)
    columns.append(column / jnp.where(norm > 0, norm, 1))
  return jnp.stack(columns, axis=1)
