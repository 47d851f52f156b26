import itertools

import jax
import numpy as np
import pytest

from fedjax_llm.federated import draws


def test_all_purposes_differ():
  numbers = [int(x) for x in draws.Purpose.__members__.values()]
  assert len(set(numbers)) == len(draws.Purpose.__members__)


@pytest.mark.parametrize("numbers", [(), (0,), (0, 0), (3, 1)])
def test_no_two_purposes_draw_the_same(numbers):
  on_host = [
    draws.generator(0, purpose, *numbers).integers(2**63)
    for purpose in draws.Purpose
  ]
  in_round = [
    jax.random.key_data(draws.stream(draws.key(0), purpose, *numbers)).tolist()
    for purpose in draws.Purpose
  ]
  for drawn in (on_host, in_round):
    assert all(x != y for x, y in itertools.combinations(drawn, 2))


def test_dropouts_and_the_gaussian_prior_are_of_streams_of_their_own():
  # Both were of purpose 6: client 0's dropouts were drawn by the prior's noise.
  dropout = draws.generator(5, draws.Purpose.DROPOUT, 2, 0).normal(size=4)
  prior = draws.generator(5, draws.Purpose.GAUSSIAN_PRIOR, 2).normal(size=4)
  assert not np.isin(dropout, prior).any()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 1.5])
@pytest.mark.parametrize(
  "make", [draws.key, lambda seed: draws.generator(seed, draws.Purpose.COHORT)]
)
def test_seeds_that_would_alias_or_fail_are_refused(seed, make):
  message = rf"\[0, 2\*\*32\), a whole number, got seed={seed}"
  with pytest.raises(ValueError, match=message):
    make(seed)


def test_the_largest_seed_is_not_the_smallest():
  largest, smallest = draws.key(2**32 - 1), draws.key(0)
  assert (jax.random.key_data(largest) != jax.random.key_data(smallest)).any()
