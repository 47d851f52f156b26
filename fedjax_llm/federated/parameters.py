"""Parts of a tree: methods that train, send and step less than all of it.

What is trained and what is fixed are two trees with `None` where the other has
its leaves, so that JAX sees in each only what is there. `parametrised` runs any
algorithm on the trained one; the fixed one is known to both ends, from the seed
or from before the first round, and never travels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.federated import clients, rounds


def split(tree: Any, is_chosen: Callable[[str], bool]) -> tuple[Any, Any]:
  """The leaves whose path is chosen, and the rest.

  >>> split({"a": 1, "b": 2}, lambda path: path == "b")
  ({'a': None, 'b': 2}, {'a': 1, 'b': None})

  Args:
    tree: of nested dictionaries.
    is_chosen: from a path, such as "layers/self_attn/q_proj/a".
  """
  keep = lambda wanted: jax.tree.map_with_path(
    lambda path, x: x if is_chosen(_name(path)) == wanted else None, tree
  )
  return keep(True), keep(False)


def combine(chosen: Any, rest: Any) -> Any:
  """The tree that was split."""
  return jax.tree.map(
    lambda x, y: y if x is None else x,
    chosen,
    rest,
    is_leaf=lambda x: x is None,
  )


def factor(path: str) -> Literal["a", "b"] | None:
  """Which LoRA factor a leaf is, by its path; None for a head or its kin."""
  name = path.split("/")[-1]
  return name if name in ("a", "b") else None


def owners(tree: Any) -> np.ndarray:
  """Of each entry of a raveled tree: 0 if of `a`, 1 if of `b`, 2 if neither."""
  number = lambda path: {"a": 0, "b": 1}.get(factor(path) or "", 2)
  leaves = zip(paths(tree), jax.tree.leaves(tree), strict=True)
  return np.concatenate(
    [np.full(np.size(leaf), number(path), np.int8) for path, leaf in leaves]
  )


def paths(tree: Any) -> list[str]:
  """The paths of all leaves."""
  return [_name(path) for path, _ in jax.tree.leaves_with_path(tree)]


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["inner", "fixed"],
  meta_fields=["join"],
)
@dataclasses.dataclass(frozen=True)
class PartState:
  """The state of an algorithm that trains a part.

  Attributes:
    inner: the state of the algorithm that trains it.
    fixed: what never moves.
    join: (trained, fixed) -> the parameters as the model takes them.
  """

  inner: Any
  fixed: Any
  join: Callable[[Any, Any], Any]

  @property
  def round(self) -> Any:
    """How many rounds are done."""
    return self.inner.round

  @property
  def trainable(self) -> Any:
    """The server's parameters as the model takes them."""
    return self.join(self.inner.trainable, self.fixed)


def parametrised(
  make: Callable[..., rounds.FederatedAlgorithm],
  loss_fn: clients.LossFn,
  *optimizers: Any,
  divide: Callable[[Any], tuple[Any, Any]],
  join: Callable[[Any, Any], Any] = combine,
  placement: clients.Placement | None = None,
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """Any algorithm, on other parameters than those that the model takes.

  Args:
    make: the algorithm's factory, such as `flasc.flasc`.
    loss_fn: see `clients.local_update`.
    *optimizers: of the clients and the server, as `make` takes them.
    divide: the model's parameters -> what is trained in their place, and what
      both ends know beside it.
    join: back, from these two. A function of a module, not a closure: states
      are of one structure if theirs is the same.
    placement: see `clients.Placement`; all devices if not given.
    **parts: the other arguments of `make`.

  Returns:
    The algorithm. Its `init` raises a `ValueError` if nothing is trained.
  """

  def inner_loss_fn(trained, shared, examples, mask, key):
    frozen, fixed = shared
    return loss_fn(join(trained, fixed), frozen, examples, mask, key)

  inner = make(inner_loss_fn, *optimizers, placement=placement, **parts)

  def init(trainable):
    trained, fixed = divide(trainable)
    if not jax.tree.leaves(trained):
      raise ValueError(
        "expected parameters that the method trains, found none among"
        f" {', '.join(paths(trainable))}."
      )
    # Copied, so that donating the state leaves the caller's arrays alone.
    fixed = rounds.replicate(jax.tree.map(jnp.array, fixed), placement)
    return PartState(inner.init(trained), fixed, join)

  def round_fn(state, frozen, examples, cohort, key):
    shared = (frozen, state.fixed)
    after, metrics = inner.round(state.inner, shared, examples, cohort, key)
    return dataclasses.replace(state, inner=after), metrics

  def received(state, key):
    return join(inner.received(state.inner, key), state.fixed)

  residual = inner.residual and (lambda state: inner.residual(state.inner))
  return rounds.FederatedAlgorithm(
    init, round_fn, received, residual, inner.noise_multiplier
  )


def partial(
  make: Callable[..., rounds.FederatedAlgorithm],
  loss_fn: clients.LossFn,
  *optimizers: Any,
  is_trained: Callable[[str], bool],
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """Any algorithm, on those leaves of the tree whose path `is_trained`.

  The others stay what they are, bit for bit, and do not travel.

  Args:
    make: as in `parametrised`.
    loss_fn: as in `parametrised`.
    *optimizers: as in `parametrised`.
    is_trained: as in `split`.
    **parts: as in `parametrised`.
  """
  return parametrised(
    make,
    loss_fn,
    *optimizers,
    divide=functools.partial(split, is_chosen=is_trained),
    **parts,
  )
