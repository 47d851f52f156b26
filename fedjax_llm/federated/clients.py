"""What happens at the clients: local training, mapped over the cohort."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from fedjax_llm.federated import local_training, mapping

# See `local_update`.
LossFn = Callable[..., tuple[Array, Array]]

# Clients trained at once on an accelerator, unless `Placement` says otherwise.
_ON_ACCELERATOR = 4
# By default, a round measures the cosines up to this many trainable numbers.
# They cost 8 bytes a number and, at this bound, 22 milliseconds a client on a
# CPU of two cores (benchmarks/round_cosines.py).
FEW = 2**22


def device_mesh(
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """Returns a mesh of the devices, by default all, on an axis "clients"."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),),
    ("clients",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
  )


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where a round is computed, how much at once, and what is measured.

  It changes the cost of a round, not its result, except for the order of
  additions.

  Attributes:
    mesh: the devices, all if not given. Its Auto axis "clients" divides the
      clients among them. The state of a round is replicated on the mesh;
      replicate `frozen` and `examples` too, or every round copies them.
    clients_per_step: the largest number of clients that a device vmaps at once,
      at least 1; if not given, 1 on a CPU and 4 elsewhere. With 1 nothing is
      vmapped, and padded steps at a client's end are not computed. A step that
      would not be full repeats clients, which are not counted twice.
    cosines: whether a round measures `update_cosine` and `innovation_cosine`.
      To do so it adds up two more vectors of each client, each as large as the
      trainable parameters. If not given, True for at most `FEW` parameters.

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
    """The largest number of clients that a device vmaps at once."""
    if self.clients_per_step is not None:
      return self.clients_per_step
    is_cpu = self.mesh.devices.flat[0].platform == "cpu"
    return 1 if is_cpu else _ON_ACCELERATOR

  def has_cosines(self, size: int) -> bool:
    """Whether a round of `size` trainable numbers measures the cosines."""
    return size <= FEW if self.cosines is None else self.cosines

  @property
  def everywhere(self) -> jax.sharding.NamedSharding:
    """The sharding that gives every device the whole array."""
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
    mask: bool [cohort, steps, batch]; False where there is no example. There,
      `indices` has the client's first row. A step without any example does not
      change the client.
    weights: float32 [cohort], each client's number of examples; zero for a
      client that does not take part. The aggregator decides how to weight.
  """

  clients: Any
  indices: Any
  mask: Any
  weights: Any


def takes_part(weights: Any) -> Any:
  """Returns whether each client takes part: its weight is finite and > 0."""
  return jnp.isfinite(weights) & (weights > 0)


def check_cohort(cohort: Cohort) -> Cohort:
  """Checks a cohort's weights, unless JAX traces them, and returns the cohort.

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


def local_update(
  loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> local_training.LocalUpdate:
  """Makes the training that one client does in one round.

  Args:
    loss_fn: `(trainable, frozen, examples, mask, key) -> (total, count)`: the
      summed loss of a batch and what to divide it by. Padded examples, where
      `mask` [batch] is False, must not count in either of them. They repeat the
      client's first example.
    optimizer: steps on the gradient of total / count. Its state is new in every
      round.

  Returns:
    A `local_training.LocalUpdate`: a loop over the steps of `indices` and
    `mask` [steps, batch]. A step whose mask is all False changes neither the
    parameters nor the optimizer's state. Such steps at the end are not
    computed, unless the client is vmapped with one that has more steps.
    `trains` is a tree of masks; where it is False, gradients and updates are
    zero.
  """
  gradient_fn = local_training.batch_gradient(loss_fn)
  return local_training.local_steps(gradient_fn, optimizer)


def map_clients(
  fn: Callable[[Any, Any], tuple[Any, Any]],
  placement: Placement | None = None,
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Maps `fn` over clients; adds up its first result, and stacks its second.

  Memory grows with `clients_per_step`. With the cohort, only the stacked
  results grow. All placements give the same result up to the order of
  additions.

  Args:
    fn: `(shared, client) -> (summand, output)`.
    placement: see `Placement`; all devices if not given.

  Returns:
    `fn(shared, clients) -> (sum, outputs)`; `clients` and `outputs` have a
    leading axis of clients.
  """
  placement = placement or Placement()
  return mapping.over_devices(fn, placement.mesh, placement.at_once)


def copies(tree: Any, population: int) -> Any:
  """Copies a tree for each client: [population, ...]."""
  copied = lambda x: jnp.broadcast_to(x, (population, *jnp.shape(x)))
  return jax.tree.map(copied, tree)


def in_turn(tiers: int) -> Callable[[Any], Any]:
  """Deals clients to tiers in turn: client i is in tier i modulo `tiers`."""
  return lambda client: client % tiers


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
