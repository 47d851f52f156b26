"""Snapshots drawn from a Gaussian prior, so that no client sends its update.

"DR-Encoder: Encode Low-rank Gradients with Random Prior for Large Language
Models Differentially Privately" (arXiv 2412.17053), by the authors of
CG-FedLLM: an autoencoder fitted on Gaussian samples with the mean and variance
of every layer in every epoch. A client tells two numbers a layer.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from fedjax_llm.federated import draws


class Moments(NamedTuple):
  """Means and mean squares of blocks of updates: [..., blocks]."""

  mean: np.ndarray
  square: np.ndarray


def blocks(trainable: Any) -> Int[np.ndarray, " n"]:
  """The block of each entry: a leaf, or a layer of one with stacked layers.

  Args:
    trainable: tree of arrays, or their shapes; leaves of three axes are layers
      of matrices.
  """
  numbers, first = [], 0
  for leaf in jax.tree.leaves(trainable):
    layers = leaf.shape[0] if len(leaf.shape) > 2 else 1
    entries = math.prod(leaf.shape)
    numbers.append(first + np.arange(layers).repeat(entries // layers))
    first += layers
  return np.concatenate(numbers)


def moments(
  vectors: Float[np.ndarray, "clients n"], owners: Int[np.ndarray, " n"]
) -> Moments:
  """What each client tells of its update: [clients, blocks].

  Args:
    vectors: the updates.
    owners: the block of each entry, from `blocks`.
  """
  sizes = np.bincount(owners)
  mean = lambda vector: np.bincount(owners, vector) / sizes
  return Moments(
    np.array([mean(x) for x in vectors]),
    np.array([mean(np.square(x, dtype=np.float64)) for x in vectors]),
  )


def draw(
  told: Moments,
  owners: Int[np.ndarray, " n"],
  count: int,
  *,
  seed: int,
  round_number: int,
) -> Float[np.ndarray, "count n"]:
  """Samples of the updates of a round.

  Args:
    told: moments of each client, which are averaged: [clients, blocks].
    owners: the block of each entry.
    count: how many samples.
    seed: of the draws.
    round_number: draws of each round are others.

  Returns:
    float32, each entry a Gaussian with the mean and variance of its block over
    all clients of the round.
  """
  mean, square = told.mean.mean(axis=0), told.square.mean(axis=0)
  # Rounding can leave a variance below zero.
  deviation = np.sqrt(np.maximum(square - mean**2, 0))
  rng = draws.generator(seed, draws.Purpose.GAUSSIAN_PRIOR, round_number)
  noise = rng.standard_normal((count, owners.size), np.float32)
  wide = lambda x: x.astype(np.float32)[owners][None]
  return wide(mean) + wide(deviation) * noise
