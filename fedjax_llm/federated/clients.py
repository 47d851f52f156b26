"""What happens at the clients: local training, mapped over the cohort."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from fedjax_llm.federated import mapping

# See `local_update` and `local_steps`.
LossFn = Callable[..., tuple[Array, Array]]
BatchGradient = Callable[..., tuple[Any, tuple[Array, Array]]]

# Clients trained at once on an accelerator, unless `Placement` says otherwise.
_ON_ACCELERATOR = 4
# At most so many trainable numbers are few: a round measures the cosines.
FEW = 2**20


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
  """How a round is computed: where, how much at once, and what is measured.

  It changes the cost of a round, not its result, except for the order of
  additions.

  Attributes:
    mesh: the devices. Its Auto axis "clients" shares the clients out over
      them; all devices if not given. The state of a round is replicated on the
      mesh; place `frozen` and `examples` alike, or every round copies them.
    clients_per_step: how many clients at most are vmapped at once on a device,
      at least 1; if not given, 1 on a CPU and 4 elsewhere. With 1 nothing is
      vmapped and no padding is computed. If it does not divide the clients,
      the last step repeats some of them, which are not counted.
    cosines: whether a round measures `update_cosine` and `innovation_cosine`,
      for which each client adds two more vectors of the trainable parameters.
      If not given, only where these are few: at most `FEW` numbers.

  Raises:
    ValueError: if `clients_per_step` is below 1, or `mesh` has no axis
      "clients" or one that is not Auto.
  """

  mesh: jax.sharding.Mesh = dataclasses.field(default_factory=device_mesh)
  clients_per_step: int | None = None
  cosines: bool | None = None

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

  def has_cosines(self, size: int) -> bool:
    """Whether a round of `size` trainable numbers measures the cosines."""
    return size <= FEW if self.cosines is None else self.cosines

  @property
  def everywhere(self) -> jax.sharding.NamedSharding:
    """The sharding of an array that every device has whole."""
    return jax.sharding.NamedSharding(self.mesh, jax.P())


def replicate(tree: Any, placement: Placement | None) -> Any:
  """Puts a whole copy of `tree` on every device of the placement."""
  placement = placement or Placement()
  if placement.mesh.size == 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, placement.everywhere)


class Cohort(NamedTuple):
  """The clients of one round, and which examples each of their steps uses.

  Attributes:
    clients: int32 [cohort], numbers of the clients in the population.
    indices: int32 [cohort, steps, batch], rows of the examples.
    mask: bool [cohort, steps, batch]; False where there is no example. A step
      without any leaves the client as it was.
    weights: float32 [cohort], each client's number of examples; zero for a
      client that does not take part. What a weight is worth is the
      aggregator's choice.
  """

  clients: Any
  indices: Any
  mask: Any
  weights: Any


def check_cohort(cohort: Cohort) -> Cohort:
  """Returns the cohort; nothing is checked while JAX traces it.

  Raises:
    ValueError: if a weight is negative, infinite or NaN.
  """
  if isinstance(cohort.weights, jax.core.Tracer):
    return cohort
  weights = np.asarray(cohort.weights)
  if not (np.isfinite(weights) & (weights >= 0)).all():
    raise ValueError(
      f"Cohort expected finite weights of at least 0, got {weights.tolist()}. A"
      " weight is a client's number of examples; 0 leaves the client out."
    )
  return cohort


class Training(NamedTuple):
  """What local training returns.

  Attributes:
    trainable: the trained parameters.
    loss: the loss summed over all steps, each before its update.
    count: how many tokens (or examples) the loss was summed over.
  """

  trainable: Any
  loss: Any
  count: Any


@dataclasses.dataclass(frozen=True)
class LocalUpdate:
  """The training that one client does in one round; call it as a function.

  Any function of the same arguments serves as well, but promises no privacy.

  Attributes:
    train: `(trainable, frozen, examples, indices, mask, key, trains=None) ->
      Training`.
    example_noise_multiplier: the standard deviation of the noise in the sum of
      a batch's clipped gradients, in clip norms; None if the gradients of
      single examples are not clipped.
  """

  train: Callable[..., Training]
  example_noise_multiplier: float | None = None

  def __call__(self, *arguments: Any, **options: Any) -> Training:
    """Calls `train`."""
    return self.train(*arguments, **options)


def local_update(
  loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> LocalUpdate:
  """Makes the training that one client does in one round.

  Args:
    loss_fn: `(trainable, frozen, examples, mask, key) -> (total, count)`: the
      summed loss of a batch and what to divide it by. Padded examples, where
      `mask` [batch] is False, must add to neither.
    optimizer: steps on the gradient of total / count. Its state starts afresh
      in every round.

  Returns:
    A `LocalUpdate`: a loop over the steps of `indices` and `mask` [steps,
    batch]. A step whose mask is all False changes neither the parameters nor
    the optimizer's state; such steps at the end are not computed, unless the
    client is vmapped with one that has more. Where `trains`, a tree of masks,
    is False, gradients and updates are zero.
  """
  return local_steps(batch_gradient(loss_fn), optimizer)


def batch_gradient(loss_fn: LossFn) -> BatchGradient:
  """Makes the gradient of a batch's mean loss, for `local_steps`."""

  def mean_loss(trainable, frozen, examples, mask, key):
    total, count = loss_fn(trainable, frozen, examples, mask, key)
    return total / jnp.maximum(count, 1), (total, count)

  def gradient_fn(*batch, trains):
    gradient, sums = jax.grad(mean_loss, has_aux=True)(*batch)
    return only(trains, gradient), sums

  return gradient_fn


def local_steps(
  gradient_fn: BatchGradient, optimizer: optax.GradientTransformation
) -> LocalUpdate:
  """Makes a client's training from a custom batch-gradient function.

  Args:
    gradient_fn: `(trainable, frozen, examples, mask, key, trains=) ->
      (gradient, (total, count))`, of a batch; see `local_update`. The gradient
      is zero where `trains` is False.
    optimizer: steps on the gradient.
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

  return LocalUpdate(fn)


def only(trains: Any, tree: Any) -> Any:
  """Sets `tree` to zero where `trains` is False; None keeps all of it."""
  if trains is None:
    return tree
  return jax.tree.map(lambda keep, x: jnp.where(keep, x, 0), trains, tree)


def map_clients(
  fn: Callable[[Any, Any], tuple[Any, Any]],
  placement: Placement | None = None,
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Maps `fn` over clients, adding up its first result, stacking its second.

  Memory grows with `clients_per_step`, and with the cohort only by what is
  stacked. All placements agree up to the order of additions.

  Args:
    fn: `(shared, client) -> (summand, output)`.
    placement: see `Placement`; all devices if not given.

  Returns:
    `fn(shared, clients) -> (sum, outputs)`; `clients` has a leading axis, and
    so have `outputs`.
  """
  placement = placement or Placement()
  return mapping.over_devices(fn, placement.mesh, placement.at_once)


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
