import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_llm.data import batches, cohorts

SIZES = strategies.lists(strategies.integers(1, 9), min_size=1, max_size=6)
SMALL = strategies.integers(1, 4)


def population(sizes) -> batches.Population:
  rows = sum(sizes)
  examples = batches.Examples(
    np.zeros((rows, 5), np.int32), np.ones((rows, 4), bool)
  )
  names = tuple(str(i) for i in range(len(sizes)))
  return batches.Population(names, examples, np.cumsum([0, *sizes]))


def assert_equal(left, right):
  for a, b in zip(left, right, strict=True):
    np.testing.assert_array_equal(a, b)


@hypothesis.given(SIZES, SMALL, SMALL, strategies.data())
def test_an_epoch_visits_every_example_of_its_client_once(
  sizes, batch_size, local_epochs, draw
):
  people = population(sizes)
  count = draw.draw(strategies.integers(1, len(sizes)))
  cohort = cohorts.cohort_sampler(
    people,
    clients_per_round=count,
    batch_size=batch_size,
    local_epochs=local_epochs,
    seed=0,
  )(draw.draw(strategies.integers(0, 99)))
  assert len(set(cohort.clients.tolist())) == count
  for client, indices, mask in zip(*cohort[:3], strict=True):
    own = np.arange(*people.starts[client : client + 2])
    steps = -(-len(own) // batch_size)
    for epoch in range(local_epochs):
      part = slice(epoch * steps, (epoch + 1) * steps)
      assert mask[part].any(axis=1).all()
      np.testing.assert_array_equal(np.sort(indices[part][mask[part]]), own)
    assert not mask[local_epochs * steps :].any()


@hypothesis.given(SIZES, SMALL, SMALL, SMALL)
def test_local_steps_cut_the_same_order_short(
  sizes, batch_size, local_epochs, local_steps
):
  def sample(**options):
    return cohorts.cohort_sampler(
      population(sizes),
      clients_per_round=1,
      batch_size=batch_size,
      local_epochs=local_epochs,
      seed=3,
      **options,
    )(7)

  whole, short = sample(), sample(local_steps=local_steps)
  np.testing.assert_array_equal(
    short.indices, whole.indices[:, :local_steps], strict=True
  )
  np.testing.assert_array_equal(
    short.mask, whole.mask[:, :local_steps], strict=True
  )


def test_shapes_and_types_never_change():
  sample = cohorts.cohort_sampler(
    population([1, 2, 30]), clients_per_round=2, batch_size=4, seed=0
  )
  for cohort in map(sample, range(10)):
    assert [(leaf.shape, leaf.dtype) for leaf in cohort] == [
      ((2,), np.int32),
      ((2, 8, 4), np.int32),
      ((2, 8, 4), np.bool_),
      ((2,), np.float32),
    ]
    assert 0 <= cohort.indices.min() <= cohort.indices.max() < 33


def test_a_cohort_depends_on_seed_and_round_alone():
  def sampler(seed):
    return cohorts.cohort_sampler(
      population([9] * 20), clients_per_round=5, batch_size=3, seed=seed
    )

  sample = sampler(1)
  forwards = [sample(i) for i in range(5)]
  for i in (3, 0, 4):
    assert_equal(sampler(1)(i), forwards[i])
  for other in (*forwards[1:], sampler(2)(0)):
    assert not np.array_equal(other.clients, forwards[0].clients)


def test_examples_are_reshuffled_by_epoch_round_and_client():
  sample = cohorts.cohort_sampler(
    population([40, 40]),
    clients_per_round=2,
    batch_size=40,
    local_epochs=2,
    seed=0,
  )
  orders = {
    tuple(step % 40)
    for cohort in map(sample, range(3))
    for client in cohort.indices
    for step in client
  }
  assert len(orders) == 3 * 2 * 2


def test_every_client_is_as_likely():
  sample = cohorts.cohort_sampler(
    population([1] * 8), clients_per_round=2, batch_size=1, seed=0
  )
  rounds = 2000
  chosen = np.concatenate([sample(i).clients for i in range(rounds)])
  share = np.bincount(chosen, minlength=8) / rounds
  # Five standard deviations of a mean of draws of probability 1/4.
  assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / rounds)


def test_weights_are_the_numbers_of_examples_owned():
  sizes = np.array([3, 1, 7])
  options = dict(clients_per_round=3, batch_size=2, local_steps=1, seed=0)
  cohort = cohorts.cohort_sampler(population(sizes), **options)(0)
  np.testing.assert_array_equal(cohort.weights, sizes[cohort.clients])


def poisson(sizes, clients_per_round, **options):
  options = dict(batch_size=2, seed=0) | options
  return cohorts.cohort_sampler(
    population(sizes),
    clients_per_round=clients_per_round,
    sampling="poisson",
    **options,
  )


def test_poisson_draws_each_client_by_itself():
  size, expected, rounds = 12, 3, 2000
  sample = poisson([1] * size, expected)
  is_there = np.zeros((rounds, size))
  for row, cohort in zip(is_there, map(sample, range(rounds)), strict=True):
    row[cohort.clients[cohort.weights > 0]] = 1
  q = expected / size
  # Five standard deviations: of how often a client is there, and two are.
  share = is_there.mean(0)
  assert np.abs(share - q).max() < 5 * np.sqrt(q * (1 - q) / rounds)
  pairs = (is_there.T @ is_there / rounds)[np.triu_indices(size, 1)]
  assert np.abs(pairs - q**2).max() < 5 * np.sqrt(q**2 * (1 - q**2) / rounds)
  # Some rounds are of nobody: with probability (1 - q)^12, about 0.03.
  nobody, rare = (is_there.sum(1) == 0).mean(), (1 - q) ** size
  assert abs(nobody - rare) < 5 * np.sqrt(rare * (1 - rare) / rounds)


def test_poisson_fills_up_with_other_clients_that_do_nothing():
  sample = poisson([3, 1, 4, 1, 5, 9, 2, 6] * 10, 4)
  sizes = np.array([3, 1, 4, 1, 5, 9, 2, 6] * 10)
  for cohort in map(sample, range(20)):
    assert np.unique(cohort.clients).size == cohort.clients.size
    is_there = cohort.weights > 0
    own = np.where(is_there, sizes[cohort.clients], 0)
    np.testing.assert_array_equal(cohort.weights, own)
    np.testing.assert_array_equal(cohort.mask.sum((1, 2)), own)


@pytest.mark.parametrize(("size", "expected"), [(30, 1), (200, 10), (9, 9)])
def test_poisson_has_room_for_all_but_the_rarest_cohorts(size, expected):
  sample = poisson([1] * size, expected)
  shapes = {tuple(leaf.shape for leaf in sample(i)) for i in range(20)}
  ((room,), *_) = shapes.pop()
  assert not shapes
  q = expected / size

  def overflow(room):
    sizes = range(room + 1, size + 1)
    return sum(math.comb(size, k) * q**k * (1 - q) ** (size - k) for k in sizes)

  assert overflow(room) < 1e-9
  assert overflow(room - 1) >= 1e-9


def test_a_cohort_larger_than_its_room_is_whole(monkeypatch):
  whole = [poisson([2] * 20, 8)(i) for i in range(5)]
  # As if all cohorts were too rare to have room for.
  none = lambda sizes, *_: np.zeros(sizes.size)
  monkeypatch.setattr("scipy.special.bdtrc", none)
  for i, cohort in enumerate(whole):
    is_there = cohort.weights > 0
    assert_equal(poisson([2] * 20, 8)(i), [leaf[is_there] for leaf in cohort])


def test_a_poisson_cohort_depends_on_seed_and_round_alone():
  sample = poisson([9] * 20, 5, seed=1)
  forwards = [sample(i) for i in range(3)]
  for i in (2, 0):
    assert_equal(poisson([9] * 20, 5, seed=1)(i), forwards[i])
  others = (*forwards[1:], poisson([9] * 20, 5, seed=2)(0))
  for other in others:
    assert not np.array_equal(other.weights, forwards[0].weights) or (
      not np.array_equal(other.clients, forwards[0].clients)
    )


@pytest.mark.parametrize(
  "options, message",
  [
    ({"clients_per_round": 4}, "<= 3, .*clients_per_round=4"),
    ({"clients_per_round": 0}, "clients_per_round=0"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"local_epochs": 0}, "local_epochs=0"),
    ({"local_steps": 0}, "local_steps=0"),
    ({"sampling": "all"}, "'fixed' or 'poisson', got sampling='all'"),
  ],
)
def test_bad_values_are_named(options, message):
  options = dict(clients_per_round=2, batch_size=2, seed=0) | options
  with pytest.raises(ValueError, match=message):
    cohorts.cohort_sampler(population([1, 2, 3]), **options)


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_a_free_place_holds_a_row_of_the_client_itself(sampling):
  # What a client computes is of its own rows alone, the padded ones too.
  people = population([1, 2, 7, 3])
  sample = cohorts.cohort_sampler(
    people, clients_per_round=3, batch_size=4, sampling=sampling, seed=0
  )
  padded = 0
  for number in range(20):
    cohort = sample(number)
    first = people.starts[cohort.clients][:, None, None]
    end = people.starts[cohort.clients + 1][:, None, None]
    assert (first <= cohort.indices).all() and (cohort.indices < end).all()
    assert cohort.indices.dtype == np.int32
    padded += (~cohort.mask).sum()
  assert padded
