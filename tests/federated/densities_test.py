import pytest

from fedjax_llm.federated import densities


def test_a_decaying_density_is_its_formula():
  # The formula is start * decay ** (round // every).
  got = densities.decaying(0.9, 0.7, every=3, rounds=11)
  assert list(got) == [0, 3, 6, 9]
  for number in range(11):
    ((expected,),) = [
      shares
      for begin, shares in densities.stages(got).items()
      if begin == number - number % 3
    ]
    assert expected == 0.9 * 0.7 ** (number // 3)


def test_a_density_that_decays_by_nothing_is_constant():
  assert densities.decaying(0.5, 1.0, every=1, rounds=9) == {0: 0.5}


def test_a_density_stops_at_its_floor():
  got = densities.decaying(1.0, 0.5, every=2, rounds=100, floor=0.2)
  assert got == {0: 1.0, 2: 0.5, 4: 0.25, 6: 0.2}


def test_schedules_of_their_own_rounds_hold_together():
  got = densities.stages({0: 1.0, 4: 0.5}, 0.3, {0: 0.9, 2: 0.8, 6: 0.7})
  assert got == {
    0: (1.0, 0.3, 0.9),
    2: (1.0, 0.3, 0.8),
    4: (0.5, 0.3, 0.8),
    6: (0.5, 0.3, 0.7),
  }


@pytest.mark.parametrize("schedule", [{}, {1: 0.5}, {-1: 0.5, 0: 0.5}])
def test_a_schedule_says_something_of_round_zero(schedule):
  with pytest.raises(ValueError, match="rounds from 0 on"):
    densities.stages(schedule)


@pytest.mark.parametrize(
  ("start", "decay", "rest"),
  [
    (0.0, 0.5, {"every": 1}),
    (1.0, 1.1, {"every": 1}),
    (1.0, 0.5, {"every": 0}),
    (1.0, 0.5, {"every": 1, "floor": 2.0}),
  ],
)
def test_a_decay_out_of_range_is_refused(start, decay, rest):
  with pytest.raises(ValueError, match="decaying expected"):
    densities.decaying(start, decay, rounds=5, **rest)
