import math

import numpy as np
import pytest

from fedjax_llm.federated.privacy import accounting, gaussian

DELTA = 1e-5
# Those of CG-FedLLM.
EPSILONS = (0.25, 2.0, 8.0)


def test_a_release_is_one_over_its_noise_and_many_compose_as_squares():
  assert gaussian.mu(4.0) == 0.25
  assert gaussian.mu(4.0, 9) == pytest.approx(0.75)
  # As one release with noise whose inverse square is the sum of theirs.
  together = sum(1 / 4.0**2 for _ in range(9)) ** -0.5
  assert gaussian.mu(together) == pytest.approx(0.75)


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 4.0])
def test_delta_is_what_two_gaussians_differ_by(mu, epsilon):
  # The integral of max(0, p - exp(epsilon) q), by the trapezoid rule.
  x = np.linspace(-12, 15, 1_000_001)
  density = lambda mean: np.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi)
  excess = np.maximum(density(mu) - math.exp(epsilon) * density(0), 0)
  expected = np.trapezoid(excess, x)
  got = gaussian.delta(mu, epsilon)
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("mu", [0.01, 0.7, 30.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.1])
def test_epsilon_is_the_inverse_of_delta(mu, delta):
  epsilon = gaussian.epsilon(mu, delta)
  if epsilon == 0:
    assert gaussian.delta(mu, 0.0) <= delta
  else:
    got = gaussian.delta(mu, epsilon)
    assert got == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize("epsilon", [1e-9, *EPSILONS, 500.0])
@pytest.mark.parametrize("count", [1, 20])
def test_the_noise_for_a_budget_spends_it(epsilon, count):
  noise = gaussian.noise_multiplier_for(epsilon, DELTA, count)
  mu = gaussian.mu(noise, count)
  got = gaussian.epsilon(mu, DELTA)
  assert got == pytest.approx(epsilon, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_accountants_agree_where_everyone_takes_part(epsilon):
  # PLD rounds losses up to a grid, RDP is a bound only.
  noise = gaussian.noise_multiplier_for(epsilon, DELTA, 20)
  pld = accounting.gaussian_epsilon(noise, 20, DELTA, "pld")
  rdp = accounting.gaussian_epsilon(noise, 20, DELTA, "rdp")
  assert epsilon * (1 - 1e-6) <= pld <= 1.01 * epsilon
  assert pld < rdp


def test_numbers_out_of_range_are_named():
  cases = [
    (lambda: gaussian.mu(0.0), "noise_multiplier=0.0"),
    (lambda: gaussian.mu(1.0, 0), "one release, got 0"),
    (lambda: gaussian.epsilon(0.0, DELTA), "got mu=0.0"),
    (lambda: gaussian.delta(1.0, -0.1), "epsilon=-0.1"),
    (lambda: gaussian.epsilon(1.0, 1.0), r"\(0, 1\), got 1.0"),
    (
      lambda: gaussian.noise_multiplier_for(0.0, DELTA),
      "target_epsilon=0.0",
    ),
    (
      lambda: gaussian.noise_multiplier_for(1.0, 0.0),
      r"\(0, 1\), got 0.0",
    ),
    (
      lambda: gaussian.noise_multiplier_for(1.0, DELTA, 0),
      "one release, got 0",
    ),
  ]
  for make, message in cases:
    with pytest.raises(ValueError, match=message):
      make()
