"""Epsilon of repeated Gaussian sums, with and without sampling.

Two accountants of `dp-accounting` compute it on the host. "pld" composes
privacy loss distributions and is the tighter one. "rdp" composes Renyi
divergences and is what most papers report. Both are upper bounds.
"""

import functools
import math
import types
from typing import Any, Literal

import numpy as np

Accountant = Literal["pld", "rdp"]


def library() -> types.ModuleType:
  """Imports and returns dp-accounting.

  Raises:
    ImportError: if it is not installed.
  """
  try:
    import dp_accounting
  except ImportError as error:
    raise ImportError(
      "privacy needs dp-accounting, the extra `privacy`: run"
      " `pip install 'dp-accounting>=0.6'`."
    ) from error
  return dp_accounting


def gaussian_epsilon(
  noise_multiplier: float, count: int, delta: float, accountant: Accountant
) -> float:
  """Returns the epsilon of `count` Gaussian sums over all members.

  Neighbours differ by one member's presence.

  Args:
    noise_multiplier: standard deviation of the noise over the clip norm, >= 0.
    count: number of sums, >= 1.
    delta: probability in (0, 1).
    accountant: "pld" or "rdp".

  Returns:
    Epsilon, which is infinite without noise.

  Raises:
    ValueError: if `count` is below 1, or `accountant` is unknown.
    ImportError: if dp-accounting is not installed.
  """
  return poisson_epsilon(1, 1, noise_multiplier, count, delta, accountant)


@functools.lru_cache
def poisson_epsilon(
  population: int,
  expected: int,
  noise_multiplier: float,
  count: int,
  delta: float,
  accountant: Accountant,
) -> float:
  """Returns the epsilon of Gaussian sums over Poisson samples.

  Each member joins a cohort independently, with probability expected /
  population. Neighbours differ by one member's presence. Other arguments, the
  result and errors are those of `gaussian_epsilon`.
  """
  _check(count, accountant)
  if noise_multiplier == 0:
    return math.inf
  dp = library()
  event = dp.GaussianDpEvent(noise_multiplier)
  if expected < population:
    event = dp.PoissonSampledDpEvent(expected / population, event)
  kinds = {"pld": dp.pld.PLDAccountant, "rdp": dp.rdp.RdpAccountant}
  return kinds[accountant]().compose(event, count).get_epsilon(delta)


@functools.lru_cache
def fixed_size_epsilon(
  population: int,
  size: int,
  noise_multiplier: float,
  count: int,
  delta: float,
  accountant: Accountant,
) -> float:
  """Returns the epsilon of Gaussian sums over cohorts of a fixed size.

  Cohorts are drawn without replacement. Neighbours differ by the data of one
  member, so sums differ by at most two clip norms. Other arguments, the result
  and errors are those of `gaussian_epsilon`.

  PLD composes the bound of Theorem 11 in Balle, Barthe and Gaboardi, "Privacy
  Amplification by Subsampling", 2018; RDP is Theorem 27 in Wang, Balle and
  Kasiviswanathan, "Subsampled Renyi Differential Privacy", 2019.
  """
  _check(count, accountant)
  if noise_multiplier == 0:
    return math.inf
  dp = library()
  if accountant == "pld":
    losses = _losses_without_replacement(
      dp, size / population, noise_multiplier
    )
    return losses.self_compose(count).get_epsilon_for_delta(delta)
  # Half, because this accountant assumes a sensitivity of one clip norm.
  event = dp.GaussianDpEvent(noise_multiplier / 2)
  event = dp.SampledWithoutReplacementDpEvent(population, size, event)
  replace = dp.NeighboringRelation.REPLACE_ONE
  ledger = dp.rdp.RdpAccountant(neighboring_relation=replace)
  return ledger.compose(event, count).get_epsilon(delta)


def _losses_without_replacement(
  dp: Any, share: float, noise_multiplier: float, interval: float = 1e-4
) -> Any:
  """Returns the privacy loss of a Gaussian sum over a share of all members.

  Let a sum over all members have delta(e). A sum over a share q then has at
  most q delta(log(1 + (exp(e) - 1) / q)) for e >= 0. Neighbours are symmetric,
  which gives the values for e < 0. Delta is computed at losses in steps of
  `interval` and interpolated by an upper bound.
  """
  everyone = dp.pld.privacy_loss_mechanism.GaussianPrivacyLoss(
    noise_multiplier, sensitivity=2
  )
  top = everyone.connect_dots_bounds().epsilon_upper
  top += math.log(share + (1 - share) * math.exp(-top))
  steps = math.ceil(top / interval)
  e = interval * np.arange(steps + 1)
  whole = e
  if share < 1:
    # log(1 + (exp(e) - 1) / q), in terms that do not overflow.
    whole = e - math.log(share) + np.log1p((share - 1) * np.exp(-e))
  delta = share * np.asarray(everyone.get_delta_for_epsilon(whole))
  mirrored = np.exp(-e) * delta - np.expm1(-e)
  losses = dp.pld.pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
    interval, -steps, steps, np.append(mirrored[:0:-1], delta)
  )
  return dp.pld.privacy_loss_distribution.PrivacyLossDistribution(losses)


def _check(count, accountant):
  if count < 1:
    raise ValueError(f"expected at least one round, got {count}.")
  if accountant not in ("pld", "rdp"):
    raise ValueError(f"expected accountant 'pld' or 'rdp', got {accountant!r}.")
