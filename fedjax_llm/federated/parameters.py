"""Parts of a tree: for methods that train and send only some parameters.

The trained and the fixed part are two trees; each has `None` where the other
has a leaf. `parametrised` runs any algorithm on the trained part. The fixed
part never travels: both ends draw it from the seed, or get it before the first
round.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import numpy as np
import optax

from fedjax_llm.federated import aggregators, clients, rounds


def split(tree: Any, is_chosen: Callable[[str], bool]) -> tuple[Any, Any]:
  """Splits a tree into the leaves whose path is chosen, and the rest.

  >>> split({"a": 1, "b": 2}, lambda path: path == "b")
  ({'a': None, 'b': 2}, {'a': 1, 'b': None})

  Args:
    tree: nested dictionaries.
    is_chosen: path -> bool; a path is, for instance,
      "layers/self_attn/q_proj/a".
  """
  keep = lambda wanted: jax.tree.map_with_path(
    lambda path, x: x if is_chosen(_name(path)) == wanted else None, tree
  )
  return keep(True), keep(False)


def combine(chosen: Any, rest: Any) -> Any:
  """Joins the two trees that `split` returned."""
  return jax.tree.map(
    lambda x, y: y if x is None else x,
    chosen,
    rest,
    is_leaf=lambda x: x is None,
  )


def factor(path: str) -> Literal["a", "b"] | None:
  """Returns the LoRA factor at a path; None for others, such as a head."""
  name = path.split("/")[-1]
  return name if name in ("a", "b") else None


def owners(tree: Any) -> np.ndarray:
  """Returns an int8 for each raveled entry: 0 in an `a`, 1 in a `b`, else 2."""
  number = lambda path: {"a": 0, "b": 1}.get(factor(path) or "", 2)
  return np.concatenate(
    [np.full(np.size(x), number(path), np.int8) for path, x in leaves(tree)]
  )


def leaves(tree: Any) -> list[tuple[str, Any]]:
  """Returns (path, leaf) for each leaf."""
  return [(_name(path), x) for path, x in jax.tree.leaves_with_path(tree)]


def paths(tree: Any) -> list[str]:
  """Returns the paths of all leaves."""
  return [path for path, _ in leaves(tree)]


def signature(tree: Any) -> str:
  """Returns a hash of all leaves' paths and shapes, 16 hexadecimal digits.

  Trees with the same signature have the same order of entries when raveled.
  """
  described = [f"{path} {tuple(np.shape(x))}" for path, x in leaves(tree)]
  return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


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
    inner: the state of the algorithm that trains the part.
    fixed: the other part.
    join: a function from (trained, fixed) to the model's parameters.
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
    """The server's parameters, in the form that the model uses."""
    return self.join(self.inner.trainable, self.fixed)


def parametrised(
  make: Callable[[clients.LossFn], rounds.FederatedAlgorithm],
  loss_fn: clients.LossFn,
  *,
  divide: Callable[[Any], tuple[Any, Any]],
  join: Callable[[Any, Any], Any] = combine,
) -> rounds.FederatedAlgorithm:
  """Runs any algorithm on other parameters than those of the model.

  >>> import optax
  >>> from fedjax_llm.federated.algorithms import flasc
  >>> of_b_alone = lambda loss_fn: parametrised(
  ...   lambda of_trained: flasc.flasc(
  ...     of_trained,
  ...     optax.sgd(0.1),
  ...     flasc.server_adamw(1e-3),
  ...     download_density=0.25,
  ...     upload_density=0.25,
  ...   ),
  ...   loss_fn,
  ...   divide=lambda tree: split(tree, lambda path: factor(path) == "b"),
  ... )

  Args:
    make: a function from a loss of the trained part to the algorithm that
      trains it.
    loss_fn: the model's loss, see `clients.local_update`.
    divide: a function from the model's parameters to (trained, fixed).
    join: a function from (trained, fixed) to the model's parameters. Define it
      at module level, not as a closure. Otherwise the states of two such
      algorithms have different structures.

  Returns:
    The algorithm. Its `init` raises a `ValueError` if nothing is trained.
  """

  def inner_loss_fn(trained, shared, examples, mask, key):
    frozen, fixed = shared
    return loss_fn(join(trained, fixed), frozen, examples, mask, key)

  inner = make(inner_loss_fn)

  def init(trainable):
    trained, fixed = divide(trainable)
    if not jax.tree.leaves(trained):
      raise ValueError(
        "expected parameters that the method trains, found none among"
        f" {', '.join(paths(trainable))}."
      )
    fixed = rounds.first_state(fixed, inner.placement)
    return PartState(inner.init(trained), fixed, join)

  def round_fn(state, frozen, examples, cohort, key):
    shared = (frozen, state.fixed)
    after, metrics = inner.round(state.inner, shared, examples, cohort, key)
    return dataclasses.replace(state, inner=after), metrics

  def received(state, key):
    return join(inner.received(state.inner, key), state.fixed)

  return inner._replace(
    init=init,
    round=round_fn,
    received=received,
    residual=inner.residual and (lambda state: inner.residual(state.inner)),
  )


def partial(
  make: Callable[[clients.LossFn], rounds.FederatedAlgorithm],
  loss_fn: clients.LossFn,
  *,
  is_trained: Callable[[str], bool],
) -> rounds.FederatedAlgorithm:
  """Runs any algorithm on the leaves that `is_trained` chooses.

  The others stay the same, bit for bit, and do not travel.

  Args:
    make: see `parametrised`.
    loss_fn: see `parametrised`.
    is_trained: path -> bool, see `split`.
  """
  divide = functools.partial(split, is_chosen=is_trained)
  return parametrised(make, loss_fn, divide=divide)


class Averaging(Protocol):
  """A function that makes an algorithm, such as `fed_avg.fed_avg`.

  Use `functools.partial` to set other arguments first, such as the densities of
  `flasc.flasc`.
  """

  def __call__(
    self,
    loss_fn: clients.LossFn,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation,
    /,
    *,
    aggregate: aggregators.Aggregator | None,
    population: int | None,
    placement: clients.Placement | None,
  ) -> rounds.FederatedAlgorithm:
    """Makes the algorithm."""
    ...
