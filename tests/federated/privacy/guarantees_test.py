import dataclasses
import math
import sys

import pytest

from fedjax_llm.federated.privacy import accounting, guarantees

DELTA = 1e-5
POISSON = guarantees.ClientLevel(2.0, DELTA, "poisson", 50, 5)
FIXED = guarantees.ClientLevel(2.0, DELTA, "fixed", 50, 5)
EXAMPLES = guarantees.ExampleLevel(4.0, DELTA, local_epochs=2)


def test_a_guarantee_is_accounted_as_its_cohorts_are_sampled():
  arguments = (50, 5, 2.0, 7, DELTA, "pld")
  assert POISSON.epsilon(7) == accounting.poisson_epsilon(*arguments)
  assert FIXED.epsilon(7) == accounting.fixed_size_epsilon(*arguments)
  assert POISSON.epsilon(7, "rdp") > POISSON.epsilon(7)


def test_an_epoch_of_a_client_costs_one_sum_however_many_steps_it_has():
  expected = accounting.gaussian_epsilon(4.0, 2 * 3, DELTA, "pld")
  assert EXAMPLES.epsilon(3) == expected


def test_without_noise_epsilon_is_infinite_and_said_so():
  bare = guarantees.ClientLevel(0.0, DELTA, "fixed", 50, 5)
  assert bare.epsilon(1) == math.inf
  assert "epsilon = inf" in bare.describe(1)


@pytest.mark.parametrize("guarantee", [FIXED, EXAMPLES])
def test_without_dp_accounting_no_guarantee_is_made(guarantee, monkeypatch):
  monkeypatch.setitem(sys.modules, "dp_accounting", None)
  with pytest.raises(ImportError, match="the extra `privacy`"):
    dataclasses.replace(guarantee, noise_multiplier=1.0)


def test_a_run_as_accounted_passes():
  POISSON.check("poisson", 5, 50)
  POISSON.check("poisson", 5, 50, local_epochs=3)
  EXAMPLES.check("fixed", 5, 50, local_epochs=2)


@pytest.mark.parametrize(
  ("guarantee", "run", "message"),
  [
    (POISSON, ("fixed", 5, 50), r"'poisson', 5, 50\), got \('fixed', 5, 50"),
    (FIXED, ("poisson", 5, 50), r"'fixed', 5, 50\), got \('poisson', 5, 50"),
    (POISSON, ("poisson", 6, 50), r"got \('poisson', 6, 50"),
    (POISSON, ("poisson", 5, 49), r"got \('poisson', 5, 49"),
    (EXAMPLES, ("fixed", 5, 50, 3), "local_epochs=2, .* got local_epochs=3"),
    (EXAMPLES, ("fixed", 5, 50), "got local_epochs=None"),
  ],
)
def test_a_run_that_samples_otherwise_is_refused(guarantee, run, message):
  with pytest.raises(ValueError, match=message):
    guarantee.check(*run)


@pytest.mark.parametrize(
  ("guarantee", "said"),
  [
    (POISSON, ["Client-level", "one client more or less", "5/50", "Poisson"]),
    (FIXED, ["of 50 clients, one of which has other data", "fixed size"]),
    (EXAMPLES, ["Example-level", "no amplification", "nobody but the client"]),
  ],
)
def test_epsilon_is_said_with_its_assumptions(guarantee, said):
  text = guarantee.describe(7)
  for name in ("pld", "rdp"):
    said = [*said, f"{guarantee.epsilon(7, name):.4g} by {name.upper()}"]
  said += ["delta = 1e-05", "7 rounds", "the seed", "not metrics"]
  said += [f"deviation {guarantee.noise_multiplier:.4g} clip norms"]
  assert [x for x in said if x.lower() not in text.lower()] == []
  assert "\n" not in text


@pytest.mark.parametrize(
  ("guarantee", "target", "accountant"),
  [
    (POISSON, 3.0, "rdp"),
    (POISSON, 0.5, "rdp"),
    (FIXED, 3.0, "rdp"),
    (FIXED, 3.0, "pld"),
    (EXAMPLES, 20.0, "rdp"),
  ],
)
def test_the_noise_for_a_budget_is_enough_and_hardly_more(
  guarantee, target, accountant
):
  needed = guarantees.noise_multiplier_for(target, 5, guarantee, accountant)

  def epsilon(multiplier):
    noisy = dataclasses.replace(guarantee, noise_multiplier=multiplier)
    return noisy.epsilon(5, accountant)

  assert epsilon(needed) <= target < epsilon(needed / 1.0011)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: POISSON.epsilon(0), "at least one round, got 0"),
    (lambda: POISSON.epsilon(1, "moments"), "'pld' or 'rdp'"),
    (
      lambda: guarantees.noise_multiplier_for(0, 1, POISSON),
      "target_epsilon=0 to be > 0",
    ),
    (
      lambda: guarantees.ClientLevel(-1, DELTA, "fixed", 9, 3),
      "noise_multiplier=-1",
    ),
    (
      lambda: guarantees.ClientLevel(1, DELTA, "shuffled", 9, 3),
      "'poisson' or 'fixed', got 'shuffled'",
    ),
    (lambda: guarantees.ClientLevel(1, DELTA, "fixed", 3, 9), "got 9 of 3"),
    (
      lambda: guarantees.ClientLevel(1, 0.2, "fixed", 9, 3),
      r"delta in \(0, 1 / 9\), got 0.2",
    ),
    (lambda: guarantees.ExampleLevel(1, 0.0), r"delta in \(0, 1\), got 0.0"),
    (lambda: guarantees.ExampleLevel(1, DELTA, 0), "local_epochs >= 1, got 0"),
    (
      lambda: guarantees.ExampleLevel(math.nan, DELTA),
      "noise_multiplier=nan to be >= 0 and finite",
    ),
  ],
)
def test_bad_values_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
