import numpy as np
import pytest

from fedjax_llm.codecs import splits

SNAPSHOTS = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


def test_the_last_rounds_are_held_out():
  rounds = np.array([0, 0, 3, 4, 4, 9, 9])
  found = splits.split(SNAPSHOTS, rounds, held_out=0.5)
  assert found.train.tolist() == [0, 1, 2]
  assert [group.tolist() for group in found.held_out] == [[3, 4], [5, 6]]
  known = SNAPSHOTS[:3]
  np.testing.assert_allclose(found.mean, known.mean(axis=0), rtol=1e-6)
  np.testing.assert_allclose(found.energy, (known**2).mean(axis=0), rtol=1e-6)
  np.testing.assert_allclose(found.scale, np.sqrt((known**2).mean()), rtol=1e-6)


def test_rounds_of_one_client_are_judged_together():
  found = splits.split(SNAPSHOTS, held_out=0.4)
  assert found.train.tolist() == [0, 1, 2, 3]
  assert [group.tolist() for group in found.held_out] == [[4, 5, 6]]


@pytest.mark.parametrize("held_out", [0, 1])
def test_all_and_nothing_are_refused(held_out):
  with pytest.raises(ValueError, match="expected held_out in"):
    splits.split(SNAPSHOTS, held_out=held_out)


def test_one_round_is_refused():
  with pytest.raises(ValueError, match="Record more rounds"):
    splits.split(SNAPSHOTS, np.zeros(7, int))
