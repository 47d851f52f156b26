"""What happens at the clients: local training, mapped over the cohort."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

LossFn = Callable[..., tuple[Array, Array]]


class Cohort(NamedTuple):
  """The clients of one round, and which examples each step of theirs uses.

  Attributes:
    clients: int32 [cohort], numbers of the clients in the population.
    indices: int32 [cohort, steps, batch], rows of the examples.
    mask: bool [cohort, steps, batch]; False where there is no example. A step
      without any leaves the client as it was.
    weights: float32 [cohort], of the clients in a weighted mean.
  """

  clients: Any
  indices: Any
  mask: Any
  weights: Any


class Training(NamedTuple):
  """What local training returns.

  Attributes:
    trainable: the trained parameters.
    loss: summed loss over all steps, each before its update.
    count: over how many tokens (or examples) it was summed.
  """

  trainable: Any
  loss: Any
  count: Any


def local_update(
  loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[..., Training]:
  """Makes the training that one client does in one round.

  Args:
    loss_fn: `(trainable, frozen, examples, mask, key) -> (total, count)`: the
      summed loss of a batch and what to divide it by. Padded examples, where
      `mask` [batch] is False, must add to neither.
    optimizer: steps on the gradient of total / count; its state starts afresh
      in every round.

  Returns:
    `fn(trainable, frozen, examples, indices, mask, key) -> Training`, a scan
    over the steps of `indices` and `mask` [steps, batch]. A step whose mask is
    all False changes neither the parameters nor the optimizer's state.
  """

  def fn(trainable, frozen, examples, indices, mask, key):
    def mean_loss(trainable, batch, mask, key):
      total, count = loss_fn(trainable, frozen, batch, mask, key)
      return total / jnp.maximum(count, 1), (total, count)

    gradient_fn = jax.value_and_grad(mean_loss, has_aux=True)

    def train(carry, inputs):
      trainable, state, loss, count = carry
      number, rows, mask = inputs
      batch = jax.tree.map(lambda x: x[rows], examples)
      step_key = jax.random.fold_in(key, number)
      (_, aux), gradient = gradient_fn(trainable, batch, mask, step_key)
      updates, state = optimizer.update(gradient, state, trainable)
      trainable = optax.apply_updates(trainable, updates)
      return trainable, state, loss + aux[0], count + aux[1]

    def step(carry, inputs):
      # One client at a time, a padded step costs nothing; under vmap the
      # condition becomes a selection.
      mask = inputs[-1]
      skip = lambda carry, inputs: carry
      return jax.lax.cond(mask.any(), train, skip, carry, inputs), None

    batch = jax.tree.map(lambda x: x[indices[0]], examples)
    sums = jax.eval_shape(loss_fn, trainable, frozen, batch, mask[0], key)
    zeros = jax.tree.map(jnp.zeros_like, sums)
    start = (trainable, optimizer.init(trainable), *zeros)
    steps = (jnp.arange(len(mask)), indices, mask)
    (trainable, _, loss, count), _ = jax.lax.scan(step, start, steps)
    return Training(trainable, loss, count)

  return fn


def map_clients(
  fn: Callable[[Any, Any], tuple[Any, Any]],
  *,
  clients_per_step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Maps `fn` over clients, adding up its first result, stacking its second.

  Memory grows with `clients_per_step`, not with the cohort, except for what
  is stacked. All placements agree up to the order of additions.

  Args:
    fn: `(shared, client) -> (summand, output)`.
    clients_per_step: how many clients are vmapped at once on a device; None
      for all. With 1 nothing is vmapped and padded steps cost nothing.
    mesh: its axis "clients" shares the cohort out over devices; None for one.

  Returns:
    `fn(shared, clients) -> (sum, outputs)`; `clients` has a leading axis, and
    so have `outputs`.

  Raises:
    ValueError: if `clients_per_step` is below 1, or `mesh` has no such axis or
      one that is not Auto.
  """
  if clients_per_step is not None and clients_per_step < 1:
    raise ValueError(f"expected {clients_per_step=} to be None or >= 1.")
  if mesh is None:
    return functools.partial(_in_chunks, fn, clients_per_step)
  axes = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  if axes.get("clients") != jax.sharding.AxisType.Auto:
    raise ValueError(
      f'expected a mesh with an Auto axis "clients", got {axes}. Make it with'
      ' jax.sharding.Mesh(jax.devices(), ("clients",)).'
    )
  return _over_devices(fn, clients_per_step, mesh)


def _over_devices(fn, clients_per_step, mesh):
  """`map_clients` on the devices of `mesh`, a part of the clients on each."""

  def present_only(shared, client):
    present, client = client
    summand, output = fn(shared, client)
    return jax.tree.map(lambda x: jnp.where(present, x, 0), summand), output

  def on_device(shared, clients):
    total, outputs = _in_chunks(present_only, clients_per_step, shared, clients)
    return jax.lax.psum(total, "clients"), outputs

  sharded = jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(jax.P(), jax.P("clients")),
    out_specs=(jax.P(), jax.P("clients")),
    # Else every scan's carry would have to be declared as varying.
    check_vma=False,
  )

  def mapped(shared, clients):
    count = _count(clients)
    # Devices that would idle repeat a client; its summand is not added.
    number = jnp.arange(count + -count % mesh.shape["clients"])
    repeated = jax.tree.map(lambda x: x[number % count], clients)
    total, outputs = sharded(shared, (number < count, repeated))
    return total, jax.tree.map(lambda x: x[:count], outputs)

  return mapped


def _in_chunks(fn, size, shared, clients):
  """`map_clients` on one device."""
  count = _count(clients)
  size = min(size or count, count)

  def together(clients):
    summands, outputs = jax.vmap(fn, in_axes=(None, 0))(shared, clients)
    return jax.tree.map(lambda x: x.sum(0), summands), outputs

  if size == 1:
    return _scan_sum(functools.partial(fn, shared), clients)
  whole = count - count % size
  chunks = jax.tree.map(
    lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), clients
  )
  total, outputs = _scan_sum(together, chunks)
  outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
  if whole == count:
    return total, outputs
  rest, last = together(jax.tree.map(lambda x: x[whole:], clients))
  join = lambda x, y: jnp.concatenate([x, y])
  return jax.tree.map(jnp.add, total, rest), jax.tree.map(join, outputs, last)


def _scan_sum(fn, xs):
  """Scans `fn: x -> (summand, output)`: the sum, and the outputs stacked."""
  shapes, _ = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], xs))

  def add(total, x):
    summand, output = fn(x)
    return jax.tree.map(jnp.add, total, summand), output

  return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), xs)


def _count(clients: Any) -> int:
  return jax.tree.leaves(clients)[0].shape[0]


def proximal(mu: float) -> optax.GradientTransformation:
  """Pulls a client towards what it received: FedProx (Li et al., 2020).

  Adds `mu * (parameters - received)` to the gradient; chain it before the
  client's optimizer: `optax.chain(proximal(0.01), optax.sgd(0.1))`.

  Raises:
    ValueError: if `mu` is negative.
  """
  if mu < 0:
    raise ValueError(f"proximal expected mu >= 0, got {mu=}.")

  def update_fn(updates, received, params):
    pull = lambda g, p, start: g + mu * (p - start)
    return jax.tree.map(pull, updates, params, received), received

  return optax.GradientTransformation(lambda params: params, update_fn)
