"""The table and the picture of populations whose every example is known."""

import matplotlib.figure
import numpy as np
import pytest

from fedjax_llm.data import batches
from fedjax_llm.reporting import clients


def population(sizes, labels=None, **fields) -> batches.Population:
  """Rows of four predictions, of which the last counts in none."""
  rows = sum(sizes)
  mask = np.tile([True, True, True, False], (rows, 1))
  return batches.Population(
    names=tuple(f"client {i}" for i in range(len(sizes))),
    examples=batches.Examples(np.zeros((rows, 5), np.int32), mask),
    starts=np.cumsum([0, *sizes]),
    labels=None if labels is None else np.array(labels, np.int32),
    **fields,
  )


def cells(table):
  """What the table says, by name."""
  head, _, *rows = (line.strip("|").split("|") for line in table.splitlines())
  return {name.strip(): value.strip() for name, value in (head, *rows)}


def test_the_table_tells_who_has_what():
  people = population(
    [1, 3, 2, 1500],
    [0] + [0, 1, 2] + [1, 1] + [2] * 1500,
    label_names=("ant", "bee", "cat", "never seen"),
    dropped=7,
  )
  assert cells(clients.table(people, name="toy")) == {
    "": "toy",
    "clients": "4",
    "examples": "1,506",
    "dropped examples": "7",
    "tokens": "4,518",
    "examples of a client, least": "1",
    "median": "2.5",
    "most": "1,500",
    "labels": "3",
    "labels of a client, mean": "1.5",
  }


def test_tokens_of_a_classified_text_are_those_read():
  people = population([2, 1])
  segments = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], np.int32)
  examples = batches.Labelled(segments, segments, np.zeros(3, np.int32))
  shown = cells(clients.table(people._replace(examples=examples), name="toy"))
  assert shown["tokens"] == "6"


def test_without_labels_the_table_says_nothing_of_them():
  assert "labels" not in clients.table(population([2, 1]), name="toy")
  with pytest.raises(ValueError, match="a population with labels"):
    clients.label_counts(population([2, 1]))


def test_labels_are_counted_by_client():
  sizes = np.random.default_rng(0).integers(1, 9, 5)
  labels = np.random.default_rng(1).integers(0, 4, sizes.sum())
  expected = np.zeros((5, 4), int)
  example = 0
  for client, size in enumerate(sizes):
    for _ in range(size):
      expected[client, labels[example]] += 1
      example += 1
  counts = clients.label_counts(population(sizes, labels))
  np.testing.assert_array_equal(counts, expected)


@pytest.fixture
def draw(tmp_path, monkeypatch):
  """Draws a population: the figure that was saved."""
  figures = []
  save = matplotlib.figure.Figure.savefig

  def spy(figure, path, **options):
    figures.append(figure)
    save(figure, path, **options)

  monkeypatch.setattr(matplotlib.figure.Figure, "savefig", spy)

  def fn(people):
    path = tmp_path / "data.png"
    clients.plot(people, path, name="toy")
    assert path.read_bytes().startswith(b"\x89PNG")
    return figures.pop()

  return fn


def ticks(axis):
  return [label.get_text() for label in axis.get_ticklabels()]


def test_clients_stand_by_the_label_that_they_have_most_of(draw):
  labels = [1, 1, 0] + [0, 0] + [2, 1, 1, 1] + [0, 0, 2]
  names = ("ant", "bee", "a label of a very long name indeed")
  figure = draw(population([3, 2, 4, 3], labels, label_names=names))
  top, *_ = figure.axes
  assert ticks(top.xaxis) == ["client 1", "client 3", "client 2", "client 0"]
  assert ticks(top.yaxis) == ["ant", "bee", "a label of a very long name…"]
  shares = top.collections[0].get_array()
  expected = [[1, 2 / 3, 0, 1 / 3], [0, 0, 3 / 4, 2 / 3], [0, 1 / 3, 1 / 4, 0]]
  np.testing.assert_allclose(shares.filled(0), expected)
  # What a client has not is left white, however little the others have.
  np.testing.assert_array_equal(shares.mask, np.array(expected) == 0)
  assert figure.get_suptitle() == "toy: 4 clients, 12 examples"


def test_many_clients_and_labels_are_not_named(draw):
  labels = np.arange(400 * 3) % 90
  top, *_ = draw(population([3] * 400, labels)).axes
  assert ticks(top.xaxis) == []
  assert len(top.get_yticks()) < 20
  assert top.collections[0].get_array().shape == (90, 400)


def test_without_labels_only_the_sizes_are_drawn(draw):
  (axes,) = draw(population([2, 3, 9])).axes
  assert axes.get_xlabel() == "examples of a client"


SIZES = {
  "one client": [5],
  "one size": [4] * 10,
  "a few sizes": [905] * 9 + [906],
  "many sizes": range(100, 900, 7),
  "a long tail": [1] * 50 + [2] * 20 + [9, 80, 700, 6000],
}


@pytest.mark.parametrize("name", SIZES)
def test_every_client_is_in_the_histogram(draw, name):
  sizes = np.array(SIZES[name])
  axes = draw(population(sizes)).axes[-1]
  assert sum(bar.get_height() for bar in axes.patches) == sizes.size
  assert axes.get_xscale() == ("log" if name == "a long tail" else "linear")
  low, high = axes.get_xlim()
  shown = [x for x in axes.get_xticks() if low <= x <= high]
  assert shown and all(x == int(x) for x in shown)
  (legend,) = axes.get_legend().get_texts()
  assert legend.get_text() == f"median {np.median(sizes):,g}"


def test_a_bar_is_of_whole_examples(draw):
  sizes = np.array([1, 1, 2, 3, 3, 3, 50, 100])
  axes = draw(population(sizes)).axes[-1]
  for bar in axes.patches:
    low, high = bar.get_x(), bar.get_x() + bar.get_width()
    assert bar.get_height() == ((low < sizes) & (sizes < high)).sum()
    assert (low % 1, high % 1) == (0.5, 0.5)
