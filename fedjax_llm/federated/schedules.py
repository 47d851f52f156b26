"""Schedules: algorithms that take turns over the rounds.

If a method's messages differ between rounds, such as a dense round before
sparse ones, the method is several algorithms with one state. Each is compiled
as a branch of one program, because the size of a message is static.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fedjax_llm.federated import rounds


def staged(
  stages: Mapping[int, rounds.FederatedAlgorithm],
) -> rounds.FederatedAlgorithm:
  """Runs each algorithm from its round on, until the next one begins.

  Args:
    stages: a mapping from rounds to the algorithms that begin there, with an
      algorithm for round 0. Their states must have one structure.

  Raises:
    ValueError: if no algorithm begins with round 0; from `init`, if the states
      differ.
  """
  starts = sorted(stages)
  if not starts or starts[0] != 0:
    raise ValueError(
      f"staged expected an algorithm that begins with round 0, got {starts}."
    )
  later = np.array(starts[1:], np.int32)
  choose = lambda number: jnp.sum(number >= later)
  return by_round(*(stages[start] for start in starts), choose=choose)


def alternating(
  *algorithms: rounds.FederatedAlgorithm,
) -> rounds.FederatedAlgorithm:
  """Runs the algorithms in turn, one round each.

  Raises:
    ValueError: from `init`, if their states differ.
  """
  return by_round(*algorithms, choose=lambda number: number % len(algorithms))


def by_round(
  *algorithms: rounds.FederatedAlgorithm,
  choose: Callable[[Int[Array, ""]], Int[Array, ""]],
) -> rounds.FederatedAlgorithm:
  """Runs in each round the algorithm that `choose` selects.

  Args:
    *algorithms: algorithms with one placement and one structure of states.
    choose: a function from the round's number, traced, to the algorithm's.

  Raises:
    ValueError: if there is no algorithm, or placements differ; from `init`, if
      states differ.
  """
  if not algorithms:
    raise ValueError("by_round expected one or more algorithms, got none.")
  first = algorithms[0]
  if len(algorithms) == 1:
    return first
  if any(x.placement != first.placement for x in algorithms):
    raise ValueError(
      "algorithms that take turns need one placement, got"
      f" {[x.placement for x in algorithms]}. Give each the same `placement=`."
    )

  def init(trainable):
    structures = [_structure(x.init, trainable) for x in algorithms]
    for number, structure in enumerate(structures):
      if structure != structures[0]:
        raise ValueError(
          "algorithms that take turns need states of one structure, got"
          f" {structures[0]} from number 0, {structure} from number {number}."
        )
    return first.init(trainable)

  def round_fn(state, *arguments):
    branches = [x.round for x in algorithms]
    return jax.lax.switch(choose(state.round), branches, state, *arguments)

  def received(state, key):
    branches = [x.received for x in algorithms]
    return jax.lax.switch(choose(state.round), branches, state, key)

  return first._replace(
    init=init,
    round=round_fn,
    received=received,
    noise_multiplier=_least(x.noise_multiplier for x in algorithms),
    example_noise_multiplier=_least(
      x.example_noise_multiplier for x in algorithms
    ),
  )


def _least(noise_multipliers: Iterable[float | None]) -> float | None:
  """Returns the least noise of all algorithms; None if one has no noise."""
  each = list(noise_multipliers)
  known = [x for x in each if x is not None]
  return min(known) if len(known) == len(each) else None


def _structure(init, trainable):
  shapes = jax.eval_shape(init, trainable)
  return jax.tree.map(lambda x: (x.shape, str(x.dtype)), shapes)
