"""What happens at the clients: local training, mapped over the cohort."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

LossFn = Callable[..., tuple[Array, Array]]


# Clients trained at once on an accelerator, unless `Placement` is told.
_ON_ACCELERATOR = 4


def device_mesh(
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """The devices, all if not given, on an axis "clients"."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),),
    ("clients",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
  )


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where clients train: on which devices, and how many at once on each.

  Attributes:
    mesh: its Auto axis "clients" shares the clients out over devices; all
      devices if not given. The state of a round is replicated on it; place
      `frozen` and `examples` alike, or every round copies them.
    clients_per_step: how many clients at most are vmapped at once on a device,
      at least 1; if not given, 1 on a CPU and 4 elsewhere. With 1 nothing is
      vmapped and no padding is computed. What does not divide the clients is
      filled up with clients computed twice.

  Raises:
    ValueError: if `clients_per_step` is below 1, or `mesh` has no axis
      "clients" or one that is not Auto.
  """

  mesh: jax.sharding.Mesh = dataclasses.field(default_factory=device_mesh)
  clients_per_step: int | None = None

  def __post_init__(self):
    if self.at_once < 1:
      raise ValueError(
        "Placement expected clients_per_step >= 1, got"
        f" {self.clients_per_step}."
      )
    names, types = self.mesh.axis_names, self.mesh.axis_types
    axes = dict(zip(names, types, strict=True))
    if axes.get("clients") != jax.sharding.AxisType.Auto:
      raise ValueError(
        f'Placement expected a mesh with an Auto axis "clients", got {axes}.'
        " Give jax.make_mesh `axis_types=(jax.sharding.AxisType.Auto,)`."
      )

  @property
  def at_once(self) -> int:
    """How many clients at most are vmapped at once on a device."""
    if self.clients_per_step is not None:
      return self.clients_per_step
    is_cpu = self.mesh.devices.flat[0].platform == "cpu"
    return 1 if is_cpu else _ON_ACCELERATOR

  @property
  def everywhere(self) -> jax.sharding.NamedSharding:
    """The sharding of an array that every device has whole."""
    return jax.sharding.NamedSharding(self.mesh, jax.P())


class Cohort(NamedTuple):
  """The clients of one round, and which examples each step of theirs uses.

  Attributes:
    clients: int32 [cohort], numbers of the clients in the population.
    indices: int32 [cohort, steps, batch], rows of the examples.
    mask: bool [cohort, steps, batch]; False where there is no example. A step
      without any leaves the client as it was.
    weights: float32 [cohort], of the clients in a weighted mean; a client of
      weight zero is left out of any mean.
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
    `fn(trainable, frozen, examples, indices, mask, key, trains=None) ->
    Training`, a loop over the steps of `indices` and `mask` [steps, batch]. A
    step whose mask is all False changes neither the parameters nor the
    optimizer's state; those at the end are not computed, unless vmapped with a
    client that has more. Where `trains`, a tree of masks, is False, gradients
    and updates are zero.
  """

  def mean_loss(trainable, frozen, examples, mask, key):
    total, count = loss_fn(trainable, frozen, examples, mask, key)
    return total / jnp.maximum(count, 1), (total, count)

  def gradient_fn(*batch, trains):
    gradient, sums = jax.grad(mean_loss, has_aux=True)(*batch)
    return only(trains, gradient), sums

  return local_steps(gradient_fn, optimizer)


def local_steps(
  gradient_fn: Callable[..., tuple[Any, tuple[Array, Array]]],
  optimizer: optax.GradientTransformation,
) -> Callable[..., Training]:
  """Makes a client's training from what it takes for the gradient of a batch.

  Args:
    gradient_fn: `(trainable, frozen, examples, mask, key, trains=) ->
      (gradient, (total, count))`, of a batch; see `local_update`. The gradient
      is zero where `trains` is False.
    optimizer: steps on it.

  Returns:
    As `local_update`.
  """

  def fn(trainable, frozen, examples, indices, mask, key, trains=None):
    def gradients(trainable, number):
      rows = lambda x: jnp.asarray(x)[indices[number]]
      batch = jax.tree.map(rows, examples)
      step_key = jax.random.fold_in(key, number)
      return gradient_fn(
        trainable, frozen, batch, mask[number], step_key, trains=trains
      )

    def step(number, carry):
      trainable, state, loss, count = carry
      gradient, (total, seen) = gradients(trainable, number)
      updates, state = optimizer.update(gradient, state, trainable)
      # For optimizers that decay what has no gradient.
      updates = only(trains, updates)
      trainable = optax.apply_updates(trainable, updates)
      after = (trainable, state, loss + total, count + seen)
      keep = lambda new, old: jnp.where(is_real[number], new, old)
      return jax.tree.map(keep, after, carry)

    # Not a condition in each step: that would be vmapped to a selection with
    # all its operands batched, `frozen` too.
    is_real = mask.any(axis=1)
    steps = jnp.max(jnp.where(is_real, jnp.arange(len(mask)) + 1, 0))
    _, sums = jax.eval_shape(gradients, trainable, 0)
    zeros = jax.tree.map(jnp.zeros_like, sums)
    start = (trainable, optimizer.init(trainable), *zeros)
    trainable, _, loss, count = jax.lax.fori_loop(0, steps, step, start)
    return Training(trainable, loss, count)

  return fn


def only(trains: Any, tree: Any) -> Any:
  """The tree with zeros where `trains` is False; all of it if that is None."""
  if trains is None:
    return tree
  return jax.tree.map(lambda keep, x: jnp.where(keep, x, 0), trains, tree)


def map_clients(
  fn: Callable[[Any, Any], tuple[Any, Any]],
  placement: Placement | None = None,
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Maps `fn` over clients, adding up its first result, stacking its second.

  Memory grows with `clients_per_step`, not with the cohort, except for what
  is stacked. All placements agree up to the order of additions.

  Args:
    fn: `(shared, client) -> (summand, output)`.
    placement: where clients train; on all devices if not given.

  Returns:
    `fn(shared, clients) -> (sum, outputs)`; `clients` has a leading axis, and
    so have `outputs`.
  """
  placement = placement or Placement()
  on_device = functools.partial(_in_steps, fn)
  devices = placement.mesh.shape["clients"]
  if devices > 1:
    on_device = _over(placement.mesh, on_device)
  return _chunked(on_device, devices, placement.at_once)


def map_in_steps(
  fn: Callable[[Any, Any], tuple[Any, Any]], at_once: int | None
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """`map_clients` of rows within one client: on the device where it runs.

  Args:
    fn: `(shared, row) -> (summand, output)`.
    at_once: how many rows are vmapped at once; None for all.
  """
  return _chunked(functools.partial(_in_steps, fn), 1, at_once)


def _chunked(on_devices, devices, at_once):
  """Cuts what is mapped over into [devices * steps, at_once, ...]."""

  def mapped(shared, clients):
    count = jax.tree.leaves(clients)[0].shape[0]
    on_each = -(-count // devices)
    steps = -(-on_each // (at_once or on_each))
    size = -(-on_each // steps)
    # Chunks that would not be full repeat clients, which are not added.
    number = np.arange(devices * steps * size).reshape(-1, size)
    chunks = jax.tree.map(lambda x: x[number % count], clients)
    total, outputs = on_devices(shared, (number < count, chunks))
    unchunk = lambda x: x.reshape(-1, *x.shape[2:])[:count]
    return total, jax.tree.map(unchunk, outputs)

  return mapped


def _over(mesh, fn):
  """Shares chunks out over the devices of `mesh`, and adds up their sums."""

  def on_device(shared, chunks):
    total, outputs = fn(shared, chunks)
    return jax.lax.psum(total, "clients"), outputs

  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(jax.P(), jax.P("clients")),
    out_specs=(jax.P(), jax.P("clients")),
    # Else the carry of every loop would have to be declared as varying.
    check_vma=False,
  )


def _in_steps(fn, shared, chunks):
  """Maps over chunks of clients [steps, size, ...], one after the other."""
  together = functools.partial(_together, fn, shared)
  shapes, _ = jax.eval_shape(together, jax.tree.map(lambda x: x[0], chunks))

  def add(total, chunk):
    summand, outputs = together(chunk)
    return jax.tree.map(jnp.add, total, summand), outputs

  return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), chunks)


def _together(fn, shared, chunk):
  """Maps over one chunk of clients, vmapped unless there is only one."""

  def one(is_counted, client):
    summand, output = fn(shared, client)
    return jax.tree.map(lambda x: jnp.where(is_counted, x, 0), summand), output

  if len(chunk[0]) == 1:
    summand, output = one(*jax.tree.map(lambda x: x[0], chunk))
    return summand, jax.tree.map(lambda x: x[None], output)
  summands, outputs = jax.vmap(one)(*chunk)
  return jax.tree.map(lambda x: x.sum(0), summands), outputs


def proximal(mu: float) -> optax.GradientTransformation:
  """Pulls a client towards what it received: FedProx (Li et al., 2020).

  Adds `mu * (parameters - received)` to the gradient; chain it before the
  client's optimizer: `optax.chain(proximal(0.01), optax.sgd(0.1))`.

  Raises:
    ValueError: if `mu` is negative.
  """
  if mu < 0:
    raise ValueError(f"proximal expected mu >= 0, got {mu=}.")

  def update_fn(updates, state, params=None):
    pull = lambda gradient, p, received: gradient + mu * (p - received)
    return jax.tree.map(pull, updates, params, state), state

  return optax.GradientTransformation(lambda params: params, update_fn)
