import math
import sys

import numpy as np
import pytest
from scipy import optimize, special

from fedjax_llm.federated.privacy import accounting

DELTA = 1e-5


def gaussian_delta(epsilon, distance):
  """Balle and Wang (2018), Theorem 8: of two Gaussians so far apart."""
  near, far = distance / 2 - epsilon / distance, -distance / 2
  far -= epsilon / distance
  return special.ndtr(near) - math.exp(epsilon) * special.ndtr(far)


def invert(delta_of, delta=DELTA):
  return optimize.brentq(lambda epsilon: delta_of(epsilon) - delta, 0, 200)


def gaussian(distance):
  return invert(lambda epsilon: gaussian_delta(epsilon, distance))


def amplified(distance, share):
  """Balle, Barthe and Gaboardi (2018): one sum over a share of everyone."""

  def delta(epsilon):
    whole = math.log(1 + math.expm1(epsilon) / share)
    return share * gaussian_delta(whole, distance)

  return invert(delta)


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (4.0, 1), (5.0, 30)])
def test_gaussian_sums_cost_what_their_closed_form_says(noise, count):
  exact = gaussian(math.sqrt(count) / noise)
  pld = accounting.gaussian_epsilon(noise, count, DELTA, "pld")
  rdp = accounting.gaussian_epsilon(noise, count, DELTA, "rdp")
  assert exact <= pld <= exact * 1.001
  assert pld < rdp < 1.2 * exact


def test_one_poisson_round_costs_what_its_closed_form_says():
  got = accounting.poisson_epsilon(50, 10, 1.5, 1, DELTA, "pld")
  exact = amplified(1 / 1.5, 10 / 50)
  assert exact <= got <= exact * 1.001


def test_one_round_of_fixed_size_costs_what_its_closed_form_says():
  # Two updates of norm S are 2 S apart.
  got = accounting.fixed_size_epsilon(50, 10, 1.5, 1, DELTA, "pld")
  exact = amplified(2 / 1.5, 10 / 50)
  assert exact <= got <= exact * 1.001


def test_everyone_in_every_round_is_no_sampling():
  exact = gaussian(2 * math.sqrt(20) / 8.0)
  got = accounting.fixed_size_epsilon(9, 9, 8.0, 20, DELTA, "pld")
  assert exact <= got <= exact * 1.001
  for name in ("pld", "rdp"):
    whole = accounting.gaussian_epsilon(8.0, 20, DELTA, name)
    assert accounting.poisson_epsilon(9, 9, 8.0, 20, DELTA, name) == whole
  half = accounting.gaussian_epsilon(4.0, 20, DELTA, "rdp")
  got = accounting.fixed_size_epsilon(9, 9, 8.0, 20, DELTA, "rdp")
  np.testing.assert_allclose(got, half, rtol=1e-6)


@pytest.mark.parametrize(
  ("population", "size", "noise", "rounds"), [(100, 10, 3.0, 50), (20, 1, 2, 8)]
)
def test_fixed_size_is_between_what_an_attack_shows_and_renyi(
  population, size, noise, rounds
):
  # Where all others send -S, one who sends S instead shifts the sum by 2 S if
  # it is sampled: Poisson sampling with half the noise. So much is known.
  arguments = (rounds, DELTA)
  known = accounting.poisson_epsilon(
    population, size, noise / 2, *arguments, "pld"
  )
  pld, rdp = (
    accounting.fixed_size_epsilon(population, size, noise, *arguments, name)
    for name in ("pld", "rdp")
  )
  assert known <= pld * 1.0001
  assert pld <= min(rdp, 1.25 * known)


@pytest.mark.parametrize(
  ("noise", "epochs", "published"),
  [(1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20)],
)
def test_published_values_of_dp_sgd(noise, epochs, published):
  # The table of TensorFlow Privacy's MNIST tutorial, which converts from Renyi
  # as Mironov (2017) does; dp-accounting as Canonne et al. (2020) do.
  q, steps = 256 / 60000, epochs * 60000 // 256
  a = np.arange(2, 64)
  renyi = np.array([steps * poisson_renyi(q, noise, order) for order in a])
  first = renyi - math.log(DELTA) / (a - 1)
  np.testing.assert_allclose(first.min(), published, rtol=0.01)
  better = first + np.log1p(-1 / a) - np.log(a) / (a - 1)
  got = accounting.poisson_epsilon(60000, 256, noise, steps, DELTA, "rdp")
  np.testing.assert_allclose(got, better.min(), rtol=0.02)
  assert got <= better.min() * (1 + 1e-9)  # It has orders in between.
  pld = accounting.poisson_epsilon(60000, 256, noise, steps, DELTA, "pld")
  assert 0.8 * got < pld < got


def poisson_renyi(q, noise, order):
  """Mironov, Talwar and Zhang (2019), of a whole order."""
  k = np.arange(order + 1)
  choose = special.gammaln(order + 1) - special.gammaln(k + 1)
  choose -= special.gammaln(order - k + 1)
  terms = choose + k * np.log(q) + (order - k) * np.log1p(-q)
  terms += k * (k - 1) / (2 * noise**2)
  return special.logsumexp(terms) / (order - 1)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
  "epsilon", [accounting.poisson_epsilon, accounting.fixed_size_epsilon]
)
def test_more_noise_and_less_of_anything_else_costs_less(epsilon, accountant):
  whole = epsilon(40, 8, 3.0, 10, DELTA, accountant)
  assert epsilon(40, 8, 3.5, 10, DELTA, accountant) < whole
  assert epsilon(40, 6, 3.0, 10, DELTA, accountant) < whole
  assert epsilon(40, 8, 3.0, 9, DELTA, accountant) < whole
  assert epsilon(40, 8, 3.0, 10, 2 * DELTA, accountant) < whole


def test_without_noise_nothing_is_private():
  for name in ("pld", "rdp"):
    assert accounting.gaussian_epsilon(0.0, 1, DELTA, name) == math.inf
    assert accounting.fixed_size_epsilon(9, 3, 0, 1, DELTA, name) == math.inf


def test_bad_questions_are_named():
  with pytest.raises(ValueError, match="at least one round, got 0"):
    accounting.gaussian_epsilon(1.0, 0, DELTA, "pld")
  with pytest.raises(ValueError, match="'pld' or 'rdp', got 'moments'"):
    accounting.fixed_size_epsilon(9, 3, 1.0, 1, DELTA, "moments")


def test_without_the_extra_the_error_names_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "dp_accounting", None)
  with pytest.raises(ImportError, match="`pip install 'dp-accounting>=0.6'`"):
    accounting.gaussian_epsilon(1.0, 123, DELTA, "pld")
