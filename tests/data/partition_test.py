"""The contract that every partitioner keeps; their laws are in `draws_test`."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from fedjax_llm.data import partition

# What follows the labels.
SKEWED = {
  "natural": lambda seed: partition.natural(),
  "natural, 40 or more": lambda seed: partition.natural(minimum_examples=40),
  "dirichlet by class": lambda seed: partition.dirichlet_by_class(
    clients=4, alpha=0.5, seed=seed
  ),
  "dirichlet by class, 9 or more": lambda seed: partition.dirichlet_by_class(
    clients=4, alpha=1.0, seed=seed, minimum_examples=9
  ),
  "dirichlet by client": lambda seed: partition.dirichlet_by_client(
    clients=4, alpha=0.5, seed=seed
  ),
  "shards": lambda seed: partition.shards(
    clients=4, shards_per_client=2, seed=seed
  ),
  "shepherd": lambda seed: partition.shepherd(clients=2, seed=seed),
  "mixed": lambda seed: partition.iid_mix(
    partition.shards(clients=4, shards_per_client=2, seed=seed),
    p=0.5,
    seed=seed,
  ),
}
# What does not look at them.
BLIND = {
  "iid": lambda seed: partition.iid(clients=11, seed=seed),
  "log-normal sizes": lambda seed: partition.log_normal_sizes(
    clients=4, sigma=1.0, seed=seed
  ),
  "zipf sizes": lambda seed: partition.zipf_sizes(
    clients=4, exponent=1.5, seed=seed
  ),
}
ALL = SKEWED | BLIND
RANDOM = [name for name in ALL if not name.startswith("natural")]

SEEDS = strategies.integers(0, 2**32 - 1)
SETTINGS = hypothesis.settings(max_examples=25, deadline=None)


def labels_of(counts, seed) -> np.ndarray:
  """Labels 0, 1, ... so many times each, in any order."""
  labels = np.repeat(np.arange(len(counts)), counts)
  return np.random.default_rng(seed).permutation(labels)


LABELS = strategies.builds(
  labels_of,
  strategies.lists(strategies.integers(40, 80), min_size=3, max_size=6),
  SEEDS,
)
FEW_LABELS = strategies.builds(
  labels_of,
  strategies.lists(strategies.integers(1, 9), min_size=1, max_size=4),
  SEEDS,
)


def check(found: partition.Partition, examples: int):
  assert list(found.names) == sorted(set(found.names))
  assert len(found.names) == len(found.indices) > 0
  for part in (*found.indices, found.left_out):
    assert part.dtype == np.int64
    assert (np.diff(part) > 0).all()
  assert all(own.size for own in found.indices)
  # Every example once: disjoint, and complete with what was left out.
  everything = np.concatenate([*found.indices, found.left_out])
  np.testing.assert_array_equal(np.sort(everything), np.arange(examples))


def assert_same(left: partition.Partition, right: partition.Partition):
  assert left.names == right.names
  assert_same_examples(left, right)


def assert_same_examples(left, right):
  pairs = [(left.left_out, right.left_out)]
  pairs += zip(left.indices, right.indices, strict=True)
  for a, b in pairs:
    np.testing.assert_array_equal(a, b)


@pytest.fixture(params=ALL)
def make(request):
  return ALL[request.param]


@pytest.mark.parametrize("name", ALL)
@hypothesis.given(LABELS, SEEDS)
@SETTINGS
def test_every_example_is_of_one_client_or_left_out(name, labels, seed):
  check(ALL[name](seed)(labels), labels.size)


@pytest.mark.parametrize("name", ALL)
@hypothesis.given(FEW_LABELS, SEEDS)
@SETTINGS
def test_scarce_data_is_divided_or_refused(name, labels, seed):
  try:
    found = ALL[name](seed)(labels)
  except ValueError as error:
    assert "Take fewer clients" in str(error) or "Lower the min" in str(error)
  else:
    check(found, labels.size)


@pytest.mark.parametrize("name", RANDOM)
@hypothesis.given(LABELS, SEEDS)
@SETTINGS
def test_a_seed_is_a_partition(name, labels, seed):
  state = np.random.get_state()[1].copy()
  found = ALL[name](seed)(labels)
  assert_same(found, ALL[name](seed)(labels))
  other = ALL[name]((seed + 1) % 2**32)(labels)
  with pytest.raises(AssertionError):
    assert_same_examples(found, other)
  np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("name", ALL)
@hypothesis.given(LABELS, SEEDS)
@SETTINGS
def test_names_of_labels_in_the_same_order_change_nothing(name, labels, seed):
  found = ALL[name](seed)(labels)
  assert_same_examples(found, ALL[name](seed)(labels + 3))
  words = np.array(["ant", "bee", "cat", "dog", "eel", "fox"])
  assert_same_examples(found, ALL[name](seed)(words[labels]))
  objects = words.astype(object)[labels]
  assert_same_examples(found, ALL[name](seed)(objects))


@pytest.mark.parametrize("name", BLIND)
@hypothesis.given(LABELS, SEEDS)
@SETTINGS
def test_quantity_skew_ignores_the_labels(name, labels, seed):
  shuffled = np.random.default_rng(seed).permutation(labels)
  found = BLIND[name](seed)(labels)
  assert_same(found, BLIND[name](seed)(shuffled))
  assert not found.left_out.size


@hypothesis.given(LABELS, SEEDS)
@SETTINGS
def test_natural_clients_are_the_ids(labels, seed):
  renamed = np.random.default_rng(seed).permutation(12)[labels]
  found = partition.natural()(renamed)
  assert set(found.names) == {str(x) for x in renamed}
  for name, own in zip(found.names, found.indices, strict=True):
    np.testing.assert_array_equal(own, np.flatnonzero(renamed == int(name)))


def test_small_natural_clients_are_left_out():
  ids = np.array(["eve", "bob", "eve", "amy", "bob", "eve"])
  found = partition.natural(minimum_examples=2)(ids)
  assert found.names == ("bob", "eve")
  assert [own.tolist() for own in found.indices] == [[1, 4], [0, 2, 5]]
  assert found.left_out.tolist() == [3]


def test_numbered_names_are_in_numeric_order():
  names = partition.iid(clients=11, seed=0)(np.zeros(50)).names
  assert [int(name) for name in names] == list(range(11))


def mixed(make, p, seed):
  return partition.iid_mix(make, p=p, seed=seed)


def test_a_mix_of_nothing_is_what_it_was(make):
  labels = labels_of([60, 70, 80, 90], 1)
  assert_same(mixed(make(3), 0.0, 3)(labels), make(3)(labels))


@pytest.mark.parametrize("name", ALL)
@hypothesis.given(LABELS, strategies.floats(0, 1), SEEDS)
@SETTINGS
def test_a_mix_keeps_sizes_and_what_is_not_pooled(name, labels, p, seed):
  before = ALL[name](seed)(labels)
  after = mixed(ALL[name](seed), p, seed)(labels)
  check(after, labels.size)
  assert after.names == before.names
  np.testing.assert_array_equal(after.left_out, before.left_out)
  for old, new in zip(before.indices, after.indices, strict=True):
    assert old.size == new.size
    kept = np.intersect1d(old, new).size
    assert kept >= old.size - round(p * old.size)


def test_a_whole_mix_is_iid():
  # A client a label, of the sizes that FLASC's offsets are wrong for.
  labels = np.repeat([0, 1, 2], [300, 700, 400])
  found = mixed(partition.natural(), 1.0, 0)(labels)
  expected = np.array([3, 7, 4]) / 14
  for own in found.indices:
    shares = np.bincount(labels[own], minlength=3) / own.size
    # Five standard deviations of a mean of independent draws; these, without
    # replacement, have less.
    error = 5 * np.sqrt(expected * (1 - expected) / own.size)
    assert (np.abs(shares - expected) < error).all()


def test_half_a_mix_keeps_half_of_the_skew():
  labels = np.repeat(np.arange(4), 1000)
  found = mixed(partition.natural(), 0.5, 0)(labels)
  for label, own in enumerate(found.indices):
    kept = (labels[own] == label).mean()
    # Half stays, and of the other half a quarter comes back.
    assert abs(kept - 0.625) < 5 * np.sqrt(0.1875 / 500) / 2


def test_a_mix_has_draws_of_its_own():
  labels = np.zeros(400, int)
  make = partition.iid(clients=4, seed=0)
  whole = mixed(make, 1.0, 0)(labels)
  for old, new in zip(make(labels).indices, whole.indices, strict=True):
    overlap = np.intersect1d(old, new).size / old.size
    assert abs(overlap - 0.25) < 5 * np.sqrt(0.1875 / 100)


BAD = {
  "minimum": (partition.natural, {"minimum_examples": 0}, ">= 1, got min"),
  "clients": (partition.iid, {"clients": 0}, "clients >= 1, got clients=0"),
  "seed": (partition.iid, {"seed": -1}, r"seed in .*, got seed=-1"),
  "large seed": (partition.shepherd, {"seed": 2**32}, "seed=4294967296"),
  "alpha": (partition.dirichlet_by_class, {"alpha": 0.0}, "alpha=0.0"),
  "infinite alpha": (
    partition.dirichlet_by_client,
    {"alpha": float("inf")},
    r"alpha in \(0, inf\), got alpha=inf",
  ),
  "minimum of a class": (
    partition.dirichlet_by_class,
    {"alpha": 1.0, "minimum_examples": 0},
    "minimum_examples=0",
  ),
  "shards": (partition.shards, {"shards_per_client": 0}, "shards_per_client=0"),
  "sigma": (partition.log_normal_sizes, {"sigma": -1.0}, "sigma=-1.0"),
  "exponent": (partition.zipf_sizes, {"exponent": float("nan")}, "nan"),
  "p": (
    lambda **options: partition.iid_mix(partition.natural(), p=1.5, seed=0),
    {},
    r"p in \[0, 1\], got p=1.5",
  ),
  "seed of a mix": (
    lambda **options: partition.iid_mix(partition.natural(), p=0.5, seed=-1),
    {},
    "seed=-1",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named_before_there_is_data(name):
  factory, options, message = BAD[name]
  if factory is not partition.natural:
    options = {"clients": 3, "seed": 0} | options
  with pytest.raises(ValueError, match=message):
    factory(**options)


IMPOSSIBLE = {
  "more clients than examples": ("iid", 10, r"at least 11 .* shape \(10,\)"),
  "more shards than examples": (
    "shards",
    7,
    "at least 8 values, 2 for each of 4 clients",
  ),
  "fewer than 40 a client": (
    "shepherd",
    79,
    "at least 80 values, 40 for each of 2 clients",
  ),
  "no natural client": ("natural, 40 or more", 39, "minimum_examples=40"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_impossible_is_refused(name):
  factory, examples, message = IMPOSSIBLE[name]
  with pytest.raises(ValueError, match=message):
    ALL[factory](0)(np.zeros(examples, int))


def test_a_table_of_values_is_refused(make):
  with pytest.raises(ValueError, match=r"shape \(500, 2\)"):
    make(0)(np.zeros((500, 2)))


@pytest.mark.parametrize("name", [x for x in SKEWED if x != "mixed"])
def test_missing_labels_are_refused(name):
  labels = np.array(["ant", None] * 100)
  with pytest.raises(ValueError, match="Are some missing"):
    SKEWED[name](0)(labels)
