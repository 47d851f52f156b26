"""Gaussian differential privacy: one number, mu, for any number of releases.

Dong, Roth, Su, "Gaussian Differential Privacy", 2022 (arXiv 1905.02383). If
releases are mu-GDP, telling two neighbours apart by them is at least as hard as
telling N(0, 1) from N(mu, 1). A sum of clipped vectors with noise of z clip
norms is exactly 1/z-GDP, and T of these sums are sqrt(T)/z-GDP. Anything
computed from them, such as the output of a decoder, has the same mu.

This is for full participation: all members are in every release. For sampled
clients, see `guarantees.ClientLevel`. Neighbours differ by one member's
presence. If instead one member's data are replaced, two clipped vectors are up
to two clip norms apart, and mu is twice as large.
"""

import math

import numpy as np


def mu(noise_multiplier: float, count: int = 1) -> float:
  """Returns the mu of `count` releases.

  Args:
    noise_multiplier: standard deviation of the noise in clip norms, z > 0.
    count: number of releases, T >= 1.

  Raises:
    ValueError: if a number is out of range.
  """
  if not 0 < noise_multiplier < math.inf:
    raise ValueError(f"expected {noise_multiplier=} to be > 0 and finite.")
  _check_count(count)
  return math.sqrt(count) / noise_multiplier


def delta(mu: float, epsilon: float) -> float:
  """Returns the least delta at which mu-GDP is (epsilon, delta)-DP.

  Args:
    mu: the mu of GDP, > 0.
    epsilon: the epsilon of DP, >= 0.

  Returns:
    Phi(-epsilon / mu + mu / 2) - exp(epsilon) Phi(-epsilon / mu - mu / 2).

  Raises:
    ValueError: if a number is out of range.
  """
  if not (0 < mu < math.inf and epsilon >= 0):
    raise ValueError(
      f"expected mu > 0 and finite, and epsilon >= 0, got {mu=}, {epsilon=}."
    )
  from scipy import special

  near, far = -epsilon / mu + mu / 2, -epsilon / mu - mu / 2
  # Both can be tiny, so their ratio is computed from logarithms.
  log_ratio = epsilon + special.log_ndtr(far) - special.log_ndtr(near)
  return float(-special.ndtr(near) * np.expm1(log_ratio))


def epsilon(mu: float, target_delta: float) -> float:
  """Returns the least epsilon at which mu-GDP is (epsilon, target_delta)-DP.

  Raises:
    ValueError: if `mu` is not positive, or the delta is not in (0, 1).
  """
  _check_delta(target_delta)
  if delta(mu, 0.0) <= target_delta:
    return 0.0
  return _root(lambda value: target_delta - delta(mu, value))


def noise_multiplier_for(
  target_epsilon: float, target_delta: float, count: int = 1
) -> float:
  """Returns the least noise, in clip norms, for `count` releases in a budget.

  Args:
    target_epsilon: the epsilon of all releases together, > 0.
    target_delta: the delta of all releases together, in (0, 1).
    count: number of releases, >= 1.

  Raises:
    ValueError: if a number is out of range.
  """
  if not 0 < target_epsilon < math.inf:
    raise ValueError(f"expected {target_epsilon=} to be > 0 and finite.")
  _check_delta(target_delta)
  _check_count(count)
  together = _root(lambda mu: delta(mu, target_epsilon) - target_delta)
  return math.sqrt(count) / together


def _root(fn):
  """Returns the positive number at which an increasing function is zero."""
  from scipy import optimize

  low = high = 1.0
  while fn(high) < 0:
    high *= 2
  while fn(low) > 0:
    low /= 2
  return optimize.root_scalar(fn, bracket=(low, high), rtol=1e-12).root


def _check_delta(target_delta):
  if not 0 < target_delta < 1:
    raise ValueError(f"expected delta in (0, 1), got {target_delta}.")


def _check_count(count):
  if count < 1:
    raise ValueError(f"expected at least one release, got {count}.")
