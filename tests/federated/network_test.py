"""Times worked by hand, and who answers."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_llm.federated import clients, network

HOME = network.Link(20, 5, 0.05, 0.1)  # Sends 4 times more slowly.
PHONE = network.Link(16, 1, 0.2, 0.5)  # 16 times.


def cohort(*numbers, steps=None, weights=None):
  """A cohort of so many steps each of 2 examples, of the 4 there could be."""
  steps = np.array(steps or [1] * len(numbers))
  mask = np.arange(4)[None, :, None] < steps[:, None, None]
  mask = np.repeat(mask, 2, axis=2)
  mask[:, :, 1] = False  # A step of one example is a step.
  return clients.Cohort(
    np.array(numbers, np.int32),
    np.zeros(mask.shape, np.int32),
    mask,
    np.array(weights or [1] * len(numbers), np.float32),
  )


def links(**options):
  return network.Network(**{"tiers": (HOME, PHONE), "seed": 0} | options)


def outcome(made, seconds, wanted=None, round_number=0, weights=None):
  """The outcome for clients 0, 1, ... who would take so long."""
  people = cohort(*range(len(seconds)), weights=weights)
  seconds, wanted = np.array(seconds, float), wanted or len(seconds)
  result = made.outcome(
    people, seconds, round_number=round_number, wanted=wanted
  )
  return result, made.waited(result, seconds, wanted=wanted)


def test_a_round_takes_what_it_takes_by_hand():
  # 1 MB down is 8 Mbit, 0.25 MB up is 2 Mbit.
  #         latency  down       steps     latency  up
  home = 0.05 + 8 / 20 + 3 * 0.1 + 0.05 + 2 / 5
  phone = 0.2 + 8 / 16 + 2 * 0.5 + 0.2 + 2 / 1
  assert (home, phone) == pytest.approx((1.2, 3.9))
  taken = links().seconds(
    cohort(4, 7, steps=(3, 2)),
    np.array([1_000_000, 1_000_000], np.int32),
    np.array([250_000, 250_000], np.int32),
  )
  np.testing.assert_allclose(taken, [1.2, 3.9], rtol=1e-12)


def test_large_messages_do_not_overflow():
  # 2 GB are 16e9 bits, more than an int32 counts.
  size = np.array([2_000_000_000], np.int32)
  (taken,) = links().seconds(cohort(0, steps=[0]), size, 0 * size)
  assert taken == pytest.approx(0.1 + 16_000 / 20)


def test_tiers_are_dealt_out_in_turn_or_as_one_says():
  everyone, nothing = cohort(0, 1, 2, 3, steps=[1] * 4), np.zeros(4, np.int32)
  latency = lambda made: made.seconds(everyone, nothing, nothing)
  in_turn = latency(links())
  np.testing.assert_allclose(in_turn, [0.2, 0.9, 0.2, 0.9])
  halves = latency(links(of_client=lambda client: client // 2))
  np.testing.assert_allclose(halves, [0.2, 0.2, 0.9, 0.9])


def test_an_ideal_network_takes_no_time_and_loses_nobody():
  people, size = cohort(5, 6), np.array([10**6] * 2, np.int32)
  seconds = network.IDEAL.seconds(people, size, size)
  result = network.IDEAL.outcome(people, seconds, round_number=3, wanted=2)
  assert all(who.all() for who in result)
  assert network.IDEAL.waited(result, seconds, wanted=2) == 0


def test_the_server_waits_for_the_last_answer():
  result, waited = outcome(links(), [3.0, 9.0, 5.0])
  assert result.answered.all()
  assert waited == 9


def test_a_deadline_leaves_out_who_is_late_and_has_paid():
  result, waited = outcome(links(deadline_seconds=5.0), [3.0, 9.0, 5.0])
  assert result.uploaded.tolist() == [True, True, True]
  assert result.answered.tolist() == [True, False, True]
  assert waited == 5


def test_a_deadline_that_all_meet_is_not_waited_for():
  _, waited = outcome(links(deadline_seconds=50.0), [3.0, 9.0, 5.0])
  assert waited == 9


def test_of_too_many_the_first_to_answer_count_and_all_pay():
  made = links(over_selection=1.5)
  assert made.selected(4) == 6
  result, waited = outcome(made, [3, 9, 5, 5, 4, 5], wanted=4)
  assert result.uploaded.all()
  # Three come at 5; the two that stand first are taken.
  assert result.answered.tolist() == [True, False, True, True, True, False]
  assert waited == 5


def test_over_selection_within_a_deadline_may_still_fall_short():
  made = links(over_selection=1.5, deadline_seconds=4.0)
  result, waited = outcome(made, [3, 9, 5, 5, 4, 5], wanted=4)
  assert result.answered.tolist() == [True, False, False, False, True, False]
  assert waited == 4


@pytest.mark.parametrize(
  "wanted, times, selected",
  [(10, 1.0, 10), (10, 1.1, 11), (10, 1.3, 13), (3, 1.3, 4), (7, 1.01, 8)],
)
def test_over_selection_rounds_up_what_is_no_whole_number(
  wanted, times, selected
):
  assert links(over_selection=times).selected(wanted) == selected


def test_who_is_gone_before_has_paid_nothing_who_leaves_has_downloaded():
  gone, _ = outcome(links(dropout_before=1.0), [1.0, 2.0])
  assert gone.selected.all() and not gone.started.any()
  left, waited = outcome(links(dropout_during=1.0), [1.0, 2.0])
  assert left.started.all() and not left.uploaded.any()
  assert not left.answered.any() and waited == 0
  _, waited = outcome(links(dropout_during=1.0, deadline_seconds=7.0), [1, 2])
  assert waited == 7


def test_who_has_no_weight_is_not_there_nor_waited_for():
  made = links(deadline_seconds=7.0)
  result, waited = outcome(made, [1.0, 9.0, 2.0], weights=[1, 0, 1])
  for who in result:
    assert who.tolist() == [True, False, True]
  assert waited == 2


def test_who_does_not_answer_trains_nothing():
  people = cohort(0, 1, 2, steps=[4, 2, 3], weights=[5, 6, 7])
  answered = np.array([True, False, True])
  left = network.Outcome(*[answered] * 4).cohort(people)
  assert left.weights.tolist() == [5, 0, 7]
  assert left.mask.any(axis=2).sum(axis=1).tolist() == [4, 0, 3]
  np.testing.assert_array_equal(left.clients, people.clients)
  assert people.mask[1].any()


def test_messages_are_counted_where_they_were_sent():
  # Of four clients, one is gone before, one leaves and one is late.
  result = network.Outcome(
    selected=np.array([True, True, True, True]),
    started=np.array([False, True, True, True]),
    uploaded=np.array([False, False, True, True]),
    answered=np.array([False, False, False, True]),
  )
  big = 2_000_000_000  # Sums exceed an int32.
  metrics = {
    "download_bytes": np.array([7, big, big, big + 1], np.int32),
    "download_entries": np.array([100, 100, 100, 100], np.int32),
    "upload_bytes": np.array([900, 800, 40, 60], np.int32),
    "upload_entries": np.array([1, 2, 30, 40], np.int32),
  }
  assert result.sent(metrics, trainable=100) == {
    "download_bytes": 6_000_000_001,
    "download_bytes_per_client": 2_000_000_001,
    "download_entries": 300,
    "upload_bytes": 100,
    "upload_bytes_per_client": 60,
    "upload_entries": 70,
    "trainable": 100,
    "sparse_messages": 2,
    "sparse_entries": 70,
  }


def test_nobodys_messages_take_nothing():
  nobody = network.Outcome(*[np.zeros(3, bool)] * 4)
  names = ("bytes", "entries")
  metrics = {
    f"{direction}_{name}": np.array([5, 6, 7], np.int32)
    for direction in ("download", "upload")
    for name in names
  }
  sums = nobody.sent(metrics, trainable=9)
  assert sums.pop("trainable") == 9
  assert set(sums.values()) == {0}


def test_dropouts_have_the_chances_asked_for():
  people = cohort(*range(50))
  made = links(dropout_before=0.3, dropout_during=0.2)
  rounds = [
    made.outcome(people, np.zeros(50), round_number=i, wanted=50)
    for i in range(80)
  ]
  started = np.mean([x.started for x in rounds])
  stayed = np.sum([x.uploaded for x in rounds]) / np.sum(
    [x.started for x in rounds]
  )
  # Four standard deviations of a share of 4000 draws, of 2800.
  assert abs(started - 0.7) < 4 * (0.7 * 0.3 / 4000) ** 0.5
  assert abs(stayed - 0.8) < 4 * (0.8 * 0.2 / 2800) ** 0.5


@hypothesis.given(strategies.integers(0, 99), strategies.permutations(range(6)))
def test_a_client_drops_out_whoever_else_is_there(round_number, order):
  made = links(dropout_before=0.4, dropout_during=0.4, seed=3)
  together = made.outcome(
    cohort(*order), np.zeros(6), round_number=round_number, wanted=6
  )
  for place, client in enumerate(order):
    alone = made.outcome(
      cohort(client), np.zeros(1), round_number=round_number, wanted=1
    )
    for who, some in zip(alone, together, strict=True):
      assert who[0] == some[place]


def test_rounds_and_seeds_drop_others():
  gone = {
    tuple(
      outcome(links(dropout_before=0.5, seed=seed), [0] * 20, round_number=i)[
        0
      ].started
    )
    for seed in (0, 1)
    for i in range(3)
  }
  assert len(gone) == 6


@pytest.mark.parametrize(
  "options, message",
  [
    ({"tiers": ()}, "at least one tier"),
    ({"tiers": (network.Link(1, 0),)}, "positive Mbit/s"),
    ({"tiers": (network.Link(1, 1, -1.0),)}, "seconds >= 0"),
    ({"dropout_before": 1.5}, r"dropout_before in \[0, 1\], got 1.5"),
    ({"dropout_during": -0.1}, r"dropout_during in \[0, 1\]"),
    ({"deadline_seconds": 0.0}, "None or > 0, got 0.0"),
    ({"over_selection": 0.9}, "over_selection >= 1, got 0.9"),
  ],
)
def test_bad_networks_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    links(**options)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_a_round_refuses_weights_that_are_no_numbers_of_examples(weight):
  def advance(state, people):
    raise AssertionError("trained")

  people = cohort(0, 1, weights=[8, weight])
  with pytest.raises(ValueError, match="finite weights of at least 0, got"):
    links().round(advance, (), people, round_number=0, wanted=2)
