import numpy as np
import pytest

from fedjax_llm.data import batches, split_rows

SIZES = (2, 3, 10, 41)
STARTS = np.cumsum([0, *SIZES])
ROWS = np.arange(STARTS[-1], dtype=np.int32)
# The token of a row is its number, so that a part tells which rows it has.
EVERYBODY = batches.Population(
  ("ann", "bob", "eve", "joe"),
  batches.Examples(ROWS[:, None].repeat(3, 1), np.ones((ROWS.size, 2), bool)),
  STARTS,
  labels=ROWS % 5,
  label_names=tuple("vwxyz"),
  dropped=2,
)


def rows_of(part):
  own = np.split(part.examples.tokens[:, 0], part.starts[1:-1])
  return dict(zip(part.names, own, strict=True))


def test_no_row_is_in_both_parts_and_none_is_lost():
  # The codec sees no example of D2.
  first, second = map(rows_of, split_rows.divide(EVERYBODY, seed=1))
  for client, (start, end) in enumerate(
    zip(STARTS[:-1], STARTS[1:], strict=True)
  ):
    name = EVERYBODY.names[client]
    assert not set(first[name]) & set(second[name])
    both = np.sort(np.append(first[name], second[name]))
    np.testing.assert_array_equal(both, np.arange(start, end))
    assert (np.diff(second[name]) > 0).all()


def test_the_shares_are_each_client_s():
  first, second = split_rows.divide(EVERYBODY, 0.3, seed=1)
  assert np.diff(first.starts).tolist() == [1, 1, 3, 12]
  assert np.diff(second.starts).tolist() == [1, 2, 7, 29]


def test_everything_of_a_row_comes_with_it():
  for part in split_rows.divide(EVERYBODY, seed=1):
    rows = part.examples.tokens[:, 0]
    np.testing.assert_array_equal(part.labels, rows % 5)
    assert part.examples.mask.shape == (rows.size, 2)
    assert part.examples.segments is None
    assert part.names == EVERYBODY.names
    assert (part.label_names, part.dropped) == (EVERYBODY.label_names, 2)


def test_a_division_is_of_the_seed_and_the_client_alone():
  alone = EVERYBODY._replace(
    names=("joe",),
    examples=batches.Examples(*(x[15:] for x in EVERYBODY.examples[:2])),
    starts=np.array([0, 41]),
    labels=None,
  )
  expected = rows_of(split_rows.divide(EVERYBODY, seed=1)[0])["joe"]
  got = rows_of(split_rows.divide(alone, seed=1)[0])["joe"]
  np.testing.assert_array_equal(got, expected)
  other = rows_of(split_rows.divide(EVERYBODY, seed=2)[0])["joe"]
  assert set(other) != set(expected)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_leaves_nothing_is_refused(share):
  with pytest.raises(ValueError, match=r"share in \(0, 1\)"):
    split_rows.divide(EVERYBODY, share, seed=1)


def test_a_client_of_one_row_is_refused():
  lone = EVERYBODY._replace(starts=np.array([0, 1, 5, 15, 56]))
  with pytest.raises(ValueError, match="two rows or more .* 1 of 'ann'"):
    split_rows.divide(lone, seed=1)
