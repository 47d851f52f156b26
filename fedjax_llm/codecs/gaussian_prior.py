"""Snapshots drawn from a Gaussian prior, so that no client sends its update.

"DR-Encoder: Encode Low-rank Gradients with Random Prior for Large Language
Models Differentially Privately" (arXiv 2412.17053), by the authors of
CG-FedLLM. They fit an autoencoder to Gaussian samples with the mean and
variance of every layer in every epoch. A client sends two numbers per layer.
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
  """Returns the block number of each entry of the raveled tree.

  A block is a leaf; if a leaf has three axes, it is a stack of layers, and each
  layer is a block.

  Args:
    trainable: tree of arrays, or their shapes.
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
  """Computes the moments that each client sends, [clients, blocks].

  Args:
    vectors: updates of the clients.
    owners: block of each entry, from `blocks`.
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
  """Draws samples in place of the updates of a round.

  Args:
    told: moments of each client [clients, blocks]; they are averaged.
    owners: block of each entry, from `blocks`.
    count: number of samples.
    seed: seed of the run.
    round_number: number of the round; each round has its own draws.

  Returns:
    float32 samples. Each entry is Gaussian, with the mean and variance of its
    block over all clients of the round.
  """
  mean, square = told.mean.mean(axis=0), told.square.mean(axis=0)
  # Rounding can leave a variance below zero.
  deviation = np.sqrt(np.maximum(square - mean**2, 0))
  rng = draws.generator(seed, draws.Purpose.GAUSSIAN_PRIOR, round_number)
  noise = rng.standard_normal((count, owners.size), np.float32)
  wide = lambda x: x.astype(np.float32)[owners][None]
  return wide(mean) + wide(deviation) * noise
