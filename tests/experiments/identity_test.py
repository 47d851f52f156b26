"""What may go on in a folder, and what is refused by name."""

import pathlib

import pytest

from fedjax_llm.experiments import identity

FOLDER = pathlib.Path("runs/x")
RECORD = {
  "experiment": "x",
  "knobs": {"rate": 0.5, "model": "models/llama", "rounds": 3},
  "data": {"base_model": "llama", "base_model_fingerprint": "f"},
  "program": {"round": "r", "start": "s", "seed": 0},
  "rounds": 3,
  "device": "1 x cpu",
  "versions": {"jax": "1", "flax": "2"},
}


def changed(**parts):
  """The record with other entries; those of mappings are merged."""
  merged = {
    name: RECORD[name] | value if isinstance(value, dict) else value
    for name, value in parts.items()
  }
  return RECORD | merged


def check(now, before=RECORD, **allowed):
  return identity.check(FOLDER, before, now, **allowed)


def test_the_same_run_goes_on():
  assert check(RECORD) == []


@pytest.mark.parametrize(
  "now, message",
  [
    (changed(experiment="y"), "experiment: 'x' there, 'y' now"),
    (changed(knobs={"rate": 1.0}), "rate: 0.5 there, 1.0 now"),
    (changed(data={"rows": "g"}), "rows: None there, 'g' now"),
    (changed(program={"round": "q"}), "a round computes something else"),
    (changed(program={"start": "q"}), "starts from another state"),
    (changed(program={"seed": 1}), "seed: 0 there, 1 now"),
  ],
)
def test_anything_else_is_refused_by_name(now, message):
  with pytest.raises(ValueError, match=f"holds a run .*\n.*{message}"):
    check(now)


def test_all_that_differs_is_named_at_once():
  with pytest.raises(ValueError) as error:
    check(changed(knobs={"rate": 1.0}, data={"rows": "g"}))
  assert "rate: " in str(error.value) and "rows: " in str(error.value)


def test_rounds_grow_but_do_not_shrink():
  assert check(changed(knobs={"rounds": 9}, rounds=9)) == []
  with pytest.raises(ValueError, match="has 3 rounds, got rounds=2"):
    check(changed(knobs={"rounds": 2}, rounds=2))


@pytest.mark.parametrize(
  "old, new, is_same",
  [
    ("models/llama", "/somewhere/else/llama", True),
    (None, "/somewhere/else/llama", True),
    ("input.txt", "/data/input.txt", True),
    ("rows", "transform", False),
    ("models/llama", 3, False),
  ],
)
def test_the_same_model_may_lie_elsewhere(old, new, is_same):
  # That it is the same is said by the fingerprints in the data.
  before = changed(knobs={"model": old})
  now = changed(knobs={"model": new}, data={"base_model": "other-name"})
  if is_same:
    assert check(now, before) == []
  else:
    with pytest.raises(ValueError, match="model: .* there, .* now"):
      check(now, before)


def test_another_model_is_refused_wherever_it_lies():
  message = "base_model_fingerprint: 'f' there, 'g' now"
  with pytest.raises(ValueError, match=message):
    check(changed(data={"base_model_fingerprint": "g"}))


@pytest.mark.parametrize(
  "now, option, sentence",
  [
    ({"device": "2 x cpu"}, "allow_other_devices", "device: '1 x cpu' there"),
    ({"versions": {"jax": "9"}}, "allow_other_versions", "jax: '1' there"),
  ],
)
def test_other_devices_and_versions_are_allowed_on_request(
  now, option, sentence
):
  # What a round computes is compiled otherwise there.
  now = changed(**now, program={"round": "other"})
  with pytest.raises(ValueError, match=f"{sentence}.*\n.*{option}=True"):
    check(now)
  told = check(now, **{option: True})
  assert sentence in told[0] and "is trusted" in told[-1]
  with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
    check(now | {"program": {"seed": 1}}, **{option: True})


def test_a_run_of_an_earlier_version_is_refused_with_the_reason():
  before = {name: x for name, x in RECORD.items() if name != "program"}
  with pytest.raises(ValueError, match="by an earlier version of fedjax-llm"):
    check(RECORD, before)
