"""The laws of the partitions, and oracles in plain loops."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedjax_llm.data import partition, partition_draws


def counts_of(labels, found: partition.Partition) -> np.ndarray:
  """Examples of each client (row) and label (column)."""
  classes = labels.max() + 1
  return np.array(
    [np.bincount(labels[own], minlength=classes) for own in found.indices]
  )


def sizes_of(found: partition.Partition) -> np.ndarray:
  return np.array([own.size for own in found.indices])


def flasc_by_loops(labels, clients, alpha, seed):
  """The authors' partition, from its description."""
  classes = sorted(set(labels.tolist()))
  mixes = stats.dirichlet.rvs(
    [alpha] * len(classes), size=clients, random_state=seed
  )
  owned = [[] for _ in range(clients)]
  for column, label in enumerate(classes):
    queue = [i for i, x in enumerate(labels) if x == label]
    total = mixes[:, column].sum()
    count = len(queue)
    for client in range(clients):
      take = int(np.round(mixes[client, column] / total * count))
      owned[client] += queue[:take]
      queue = queue[take:]
  return [sorted(own) for own in owned]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.05, 1.0, 50.0])
def test_dirichlet_by_client_is_flascs(alpha, seed):
  labels = np.random.default_rng(seed).choice([3, 5, 8, 9], 400)
  found = partition.dirichlet_by_client(clients=13, alpha=alpha, seed=seed)(
    labels
  )
  expected = flasc_by_loops(labels, 13, alpha, seed)
  assert [own.tolist() for own in found.indices] == expected


# Classes in the first 40,000 training images of CIFAR-10, files 1 to 4.
CIFAR = [3986, 3986, 4048, 3984, 4003, 3975, 4020, 4023, 3997, 3978]


def test_dirichlet_by_client_has_the_published_sizes_on_cifar():
  labels = np.repeat(np.arange(10), CIFAR)
  found = partition.dirichlet_by_client(clients=500, alpha=0.1, seed=0)(labels)
  sizes = sizes_of(found)
  assert (sizes.min(), sizes.max(), sizes.sum()) == (67, 109, 39_921)
  assert round(sizes.mean(), 1) == 79.8
  assert round((counts_of(labels, found) > 0).sum(1).mean(), 1) == 4.0


def test_dirichlet_by_client_has_the_published_sizes_on_20_newsgroups():
  # 80 % of 11,314 examples, as many of each class.
  labels = np.arange(11_314 * 4 // 5) % 20
  found = partition.dirichlet_by_client(clients=350, alpha=0.1, seed=0)(labels)
  sizes = sizes_of(found)
  assert (sizes.min(), sizes.max()) == (21, 32)
  assert round(sizes.mean(), 1) == 25.4
  assert round((counts_of(labels, found) > 0).sum(1).mean(), 1) == 5.1


def test_dirichlet_by_client_refuses_draws_that_underflow():
  make = partition.dirichlet_by_client(clients=20, alpha=1e-6, seed=0)
  with pytest.raises(ValueError, match="alpha=1e-06 one of the 5 classes"):
    make(np.arange(100) % 5)


@pytest.mark.parametrize("alpha", [0.3, 3.0])
def test_shares_of_a_class_have_the_moments_of_a_dirichlet(alpha):
  clients, classes, each = 5, 800, 250
  labels = np.repeat(np.arange(classes), each)
  found = partition.dirichlet_by_class(clients=clients, alpha=alpha, seed=0)(
    labels
  )
  shares = counts_of(labels, found) / each
  # Both cuts of a share are rounded down to an example.
  rounded = 1 / each
  second = (alpha + 1) / (clients * (clients * alpha + 1))
  for moment, expected in ((shares, 1 / clients), (shares**2, second)):
    error = 5 * moment.std(1) / np.sqrt(classes)
    assert (np.abs(moment.mean(1) - expected) < error + 2 * rounded).all()


def test_a_minimum_is_kept_by_drawing_again():
  labels = np.arange(300) % 3
  options = dict(clients=10, alpha=0.5)
  smallest = lambda seed, minimum: sizes_of(
    partition.dirichlet_by_class(
      **options, seed=seed, minimum_examples=minimum
    )(labels)
  ).min()
  assert min(smallest(seed, 1) for seed in range(20)) < 5
  assert min(smallest(seed, 5) for seed in range(20)) >= 5


def test_a_minimum_that_no_draw_keeps_is_an_error():
  make = partition.dirichlet_by_class(
    clients=10, alpha=0.01, seed=0, minimum_examples=20
  )
  message = "none of 1000 draws with alpha=0.01 .* 20 or more of the 300"
  with pytest.raises(ValueError, match=message):
    make(np.arange(300) % 3)


def test_iid_sizes_are_equal_up_to_one():
  sizes = sizes_of(partition.iid(clients=7, seed=0)(np.zeros(100)))
  assert set(sizes) == {14, 15}


def test_a_client_of_two_shards_has_two_labels():
  labels = np.random.default_rng(0).permutation(np.arange(2000) % 10)
  make = partition.shards(clients=50, shards_per_client=2, seed=0)
  counts = counts_of(labels, make(labels))
  assert set(counts.sum(1)) == {40}
  # A tenth of the shards is of one label, so no shard has two.
  assert set(counts[counts > 0]) == {20, 40}


def test_log_normal_sizes_have_that_spread():
  clients, sigma = 2000, 0.8
  make = partition.log_normal_sizes(clients=clients, sigma=sigma, seed=0)
  logarithms = np.log(sizes_of(make(np.zeros(2_000_000))) - 1.0)
  # The standard deviation of a sample's, and room for rounding.
  error = sigma / np.sqrt(2 * clients)
  assert abs(logarithms.std() - sigma) < 5 * error + 1e-3
  assert abs(stats.skew(logarithms)) < 5 * np.sqrt(6 / clients)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 2.0])
def test_zipf_sizes_follow_the_power_law(exponent):
  clients, examples = 30, 5000
  make = partition.zipf_sizes(clients=clients, exponent=exponent, seed=0)
  sizes = sizes_of(make(np.zeros(examples)))
  total = sum(k**-exponent for k in range(1, clients + 1))
  for k, size in enumerate(sizes, start=1):
    assert abs(size - 1 - (examples - clients) * k**-exponent / total) <= 1


@pytest.mark.parametrize(
  "make",
  [
    partition.log_normal_sizes(clients=30, sigma=1e6, seed=0),
    partition.zipf_sizes(clients=30, exponent=1e6, seed=0),
  ],
  ids=["log-normal", "zipf"],
)
def test_in_the_extreme_one_client_has_all_but_one_each(make):
  assert sorted(sizes_of(make(np.zeros(100)))) == [1] * 29 + [71]


def test_clients_of_any_size_are_iid():
  labels = np.repeat(np.arange(4), 2500)
  found = partition.zipf_sizes(clients=20, exponent=1.0, seed=0)(labels)
  for counts in counts_of(labels, found):
    size = counts.sum()
    # Five standard deviations; the smallest clients say little.
    assert np.abs(counts / size - 0.25).max() < 5 * np.sqrt(0.1875 / size)


def shepherd_by_loops(categories, clients, seed):
  """The reference's steps, one by one, with a stable sort."""
  rng = np.random.RandomState(seed)
  table = pd.Series(categories).sort_values(kind="stable")
  held_out = []
  for category in sorted(set(categories)):
    group = table[table == category]
    held_out += group.sample(n=10, random_state=rng).index.tolist()
  rest = table.drop(index=held_out)
  fair = len(rest) / clients
  while True:
    owned = [[] for _ in range(clients)]
    for category in rest.unique():
      queue = rest[rest == category].index.to_numpy(copy=True)
      rng.shuffle(queue)
      shares = rng.dirichlet([0.5] * clients)
      for i in range(clients):
        if len(owned[i]) >= fair:
          shares[i] = 0
      shares = shares / shares.sum()
      start, share = 0, 0.0
      for i in range(clients):
        share += shares[i]
        end = int(share * len(queue)) if i < clients - 1 else len(queue)
        owned[i] += queue[start:end].tolist()
        start = end
    if min(map(len, owned)) >= 40:
      return [sorted(own) for own in owned], sorted(held_out)


@pytest.mark.parametrize("seed", [0, 42])
def test_shepherds_split_is_the_references(seed):
  words = ["brainstorming", "closed_qa", "open_qa", "summarization"]
  categories = np.random.default_rng(seed).choice(words, 900)
  found = partition.shepherd(clients=8, seed=seed)(categories)
  owned, held_out = shepherd_by_loops(categories, 8, seed)
  assert [own.tolist() for own in found.indices] == owned
  assert found.left_out.tolist() == held_out


def test_shepherds_split_needs_more_of_a_category_than_it_holds_out():
  categories = np.array(
    ["rare"] * partition_draws.SHEPHERD_HELD_OUT + ["often"] * 500
  )
  with pytest.raises(ValueError, match="more than 10 .* got 10 of 'rare'"):
    partition.shepherd(clients=3, seed=0)(categories)


@pytest.fixture(scope="module")
def dolly(data) -> list[list[str]]:
  """Categories of Dolly: of the published test file, then of ten clients."""
  folder = data / "dolly15k_fed10"
  names = ["global_test", *(f"local_training_{i}" for i in range(10))]
  return [
    [record["category"] for record in json.loads(path.read_text())]
    for path in (folder / f"{name}.json" for name in names)
  ]


def test_dolly_is_split_over_a_hundred_clients(dolly):
  categories = np.array([x for part in dolly for x in part])
  found = partition.shepherd(clients=100, seed=42)(categories)
  left_out = pd.Series(categories[found.left_out]).value_counts()
  assert (left_out == 10).all() and len(left_out) == 8
  assert sizes_of(found).min() >= 40


def test_shards_of_dolly_are_the_published_ones(dolly):
  _, *published = dolly
  names, labels = np.unique(np.concatenate(published), return_inverse=True)
  counts = [
    np.bincount(np.searchsorted(names, x), minlength=8) for x in published
  ]
  make = partition.shards(clients=20, shards_per_client=1, seed=0)
  shards = [tuple(row) for row in counts_of(labels, make(labels))]
  # Each published client holds two of our shards, and every one is used.
  for client in counts:
    pair = next(
      (a, b)
      for a in shards
      for b in shards
      if (np.add(a, b) == client).all() and (a != b or shards.count(a) > 1)
    )
    for shard in pair:
      shards.remove(shard)
  assert not shards
