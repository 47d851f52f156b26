"""A map over clients, or over examples, that adds up one of its results.

Rows are cut into chunks, [devices * steps, at once, ...]. A device takes its
chunks one after the other, and vmaps the rows of a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A function of one row: (shared, row) -> (summand, output). And its map over
# rows: (shared, rows) -> (sum of the summands, stacked outputs).
Mapped = Callable[[Any, Any], tuple[Any, Any]]


def over_devices(fn: Mapped, mesh: jax.sharding.Mesh, at_once: int) -> Mapped:
  """Maps `fn` over rows on all devices of the axis "clients" of `mesh`.

  Args:
    fn: `(shared, row) -> (summand, output)`.
    mesh: the devices.
    at_once: the largest number of rows that a device vmaps at once.
  """
  on_device = functools.partial(_in_steps, fn)
  devices = mesh.shape["clients"]
  if devices > 1:
    on_device = _over(mesh, on_device)
  return _chunked(on_device, devices, at_once)


def in_steps(fn: Mapped, at_once: int | None) -> Mapped:
  """Maps `fn` over rows on the device where it is called.

  Args:
    fn: `(shared, row) -> (summand, output)`.
    at_once: the largest number of rows that are vmapped at once; None for all.
  """
  return _chunked(functools.partial(_in_steps, fn), 1, at_once)


def _chunked(on_devices, devices, at_once):
  """Cuts the rows into chunks, [devices * steps, at most at_once, ...]."""

  def mapped(shared, rows):
    count = jax.tree.leaves(rows)[0].shape[0]
    on_each = -(-count // devices)
    steps = -(-on_each // (at_once or on_each))
    size = -(-on_each // steps)
    # The last chunks are filled with repeated rows, which are not added.
    number = np.arange(devices * steps * size).reshape(-1, size)
    chunks = jax.tree.map(lambda x: x[number % count], rows)
    total, outputs = on_devices(shared, (number < count, chunks))
    unchunk = lambda x: x.reshape(-1, *x.shape[2:])[:count]
    return total, jax.tree.map(unchunk, outputs)

  return mapped


def _over(mesh, fn):
  """Divides chunks among the devices of `mesh`, and adds up their sums."""

  def on_device(shared, chunks):
    total, outputs = fn(shared, chunks)
    return jax.lax.psum(total, "clients"), outputs

  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(jax.P(), jax.P("clients")),
    out_specs=(jax.P(), jax.P("clients")),
    # Otherwise the carry of every loop would have to be declared as varying.
    check_vma=False,
  )


def _in_steps(fn, shared, chunks):
  """Maps over chunks of rows [steps, size, ...], one after the other."""
  together = functools.partial(_together, fn, shared)
  shapes, _ = jax.eval_shape(together, jax.tree.map(lambda x: x[0], chunks))

  def add(total, chunk):
    summand, outputs = together(chunk)
    return jax.tree.map(jnp.add, total, summand), outputs

  return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), chunks)


def _together(fn, shared, chunk):
  """Maps over one chunk of rows, vmapped unless there is only one."""

  def one(is_counted, row):
    summand, output = fn(shared, row)
    return jax.tree.map(lambda x: jnp.where(is_counted, x, 0), summand), output

  if len(chunk[0]) == 1:
    summand, output = one(*jax.tree.map(lambda x: x[0], chunk))
    return summand, jax.tree.map(lambda x: x[None], output)
  summands, outputs = jax.vmap(one)(*chunk)
  return jax.tree.map(lambda x: x.sum(0), summands), outputs
