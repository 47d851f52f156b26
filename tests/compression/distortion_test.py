"""Both cosines are those of their definition, by plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.compression import distortion

RNG = np.random.default_rng(0)
SENT = RNG.normal(1, 1, (5, 400)).astype(np.float32)
ARRIVED = (0.3 * SENT + RNG.normal(0, 0.5, SENT.shape)).astype(np.float32)


def cosines(sent, arrived, weights):
  shares = jax.vmap(distortion.share)(
    jnp.asarray(sent), jnp.asarray(arrived), jnp.asarray(weights)
  )
  total = jax.tree.map(lambda x: x.sum(0), shares)
  return {name: float(x) for name, x in distortion.cosines(total).items()}


def np_cosines(sent, arrived, weights):
  """Client by client and entry by entry, in float64."""
  clients, n = sent.shape
  u, r = sent.astype(np.float64), arrived.astype(np.float64)
  p = [weight / sum(weights) for weight in weights]
  mean_u = [sum(p[i] * u[i, k] for i in range(clients)) for k in range(n)]
  mean_r = [sum(p[i] * r[i, k] for i in range(clients)) for k in range(n)]
  of_mean, own = np.zeros((2, 3))
  for k in range(n):
    pair = mean_u[k], mean_r[k]
    of_mean += pair[0] ** 2, pair[1] ** 2, pair[0] * pair[1]
    for i in range(clients):
      x, y = u[i, k] - mean_u[k], r[i, k] - mean_r[k]
      own += p[i] * np.array([x**2, y**2, x * y])
  return {
    "update_cosine": of_mean[2] / np.sqrt(of_mean[0] * of_mean[1]),
    "innovation_cosine": own[2] / np.sqrt(own[0] * own[1]),
  }


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [3, 0, 1, 7, 2]])
def test_the_sums_are_of_the_definition(weights):
  weights = np.array(weights, np.float32)
  # Clients that differ from the mean by very different amounts.
  sent = SENT * np.array([[0.1], [1], [5], [1], [2]], np.float32)
  got, expected = (f(sent, ARRIVED, weights) for f in (cosines, np_cosines))
  # Energies lose a digit or two to the mean's.
  assert got == pytest.approx(expected, abs=1e-5)


def test_the_square_is_the_share_of_the_innovations_that_arrives():
  # The least error of g * (r - mean r) for u - mean u, over all factors g.
  own, arrived = (x - x.mean(axis=0) for x in (SENT, ARRIVED))
  factors = np.linspace(0, 3, 3001)
  errors = [np.sum((own - g * arrived) ** 2) for g in factors]
  got = cosines(SENT, ARRIVED, np.ones(5, np.float32))["innovation_cosine"]
  assert 1 - got**2 == pytest.approx(min(errors) / np.sum(own**2), abs=1e-5)


def test_what_arrives_whole_has_cosines_of_one():
  got = cosines(SENT, SENT, np.ones(5, np.float32))
  assert got == pytest.approx(
    {"update_cosine": 1, "innovation_cosine": 1}, abs=1e-5
  )


def test_a_decoder_that_ignores_its_message_transmits_nothing():
  # Exactly: what is left of sums that cancel must not look like something.
  arrived = np.broadcast_to(SENT.mean(0), SENT.shape)
  got = cosines(SENT, arrived, np.array([1, 3, 1, 7, 2], np.float32))
  assert got["innovation_cosine"] == 0
  assert got["update_cosine"] > 0.9


@pytest.mark.parametrize("arrived", [SENT, np.zeros_like(SENT)])
def test_there_is_nothing_to_compare_of_nobody(arrived):
  got = cosines(SENT, arrived, np.zeros(5, np.float32))
  assert got == {"update_cosine": 0, "innovation_cosine": 0}


def test_one_client_has_nothing_of_its_own():
  got = cosines(SENT[:1], ARRIVED[:1], np.ones(1, np.float32))
  assert got["innovation_cosine"] == 0


def test_tiny_updates_have_cosines_too():
  small = np.float32(1e-12)
  got = cosines(small * SENT, small * ARRIVED, np.ones(5, np.float32))
  expected = np_cosines(SENT, ARRIVED, np.ones(5))
  assert got == pytest.approx(expected, abs=1e-5)
