"""Random draws: each is named by a seed, its purpose, the round, the client.

So no two draws share a stream, and a draw does not depend on how many came
before it: a resumed run draws what the uninterrupted one would have drawn.
"""

import enum
import numbers
from typing import Any

import jax
import numpy as np

_SEEDS = 2**32


class Purpose(enum.IntEnum):
  """What a draw is for. A new number would change all published results."""

  # Drawn on the host, by NumPy.
  COHORT = 0
  EXAMPLES = 1
  PARTITION = 2
  MIX = 3
  HELD_OUT = 4
  SPLIT_ROWS = 5
  DROPOUT = 6
  GAUSSIAN_PRIOR = 7
  PRETRAINING = 8
  # Drawn in the round, by JAX.
  DOWNLOAD = 16
  TRAIN = 17
  UPLOAD = 18
  AGGREGATE = 19
  SERVER = 20


def check_seed(seed: int) -> int:
  """Returns `seed`.

  Raises:
    ValueError: if it is not a whole number in [0, 2**32). JAX would treat a
      larger seed as a smaller one.
  """
  if not (isinstance(seed, numbers.Integral) and 0 <= seed < _SEEDS):
    raise ValueError(
      f"expected a seed in [0, 2**32), a whole number, got {seed=}."
    )
  return seed


def key(seed: int) -> Any:
  """Returns the key of an experiment; `stream` makes all others from it.

  Raises:
    ValueError: if `seed` is not in [0, 2**32).
  """
  return jax.random.key(check_seed(seed))


def stream(key: Any, *names: Any) -> Any:
  """Returns the key of one draw.

  Args:
    key: the experiment's key.
    *names: the purpose, the round and the client; all may be traced.
  """
  for number in names:
    key = jax.random.fold_in(key, number)
  return key


def generator(seed: int, purpose: Purpose, *names: int) -> np.random.Generator:
  """Returns the NumPy generator of one draw on the host.

  Args:
    seed: the experiment's seed.
    purpose: what is drawn.
    *names: numbers that identify the draw, such as the round and the client.

  Raises:
    ValueError: if `seed` is not in [0, 2**32).
  """
  return np.random.default_rng([check_seed(seed), int(purpose), *names])
