import datasets
import numpy as np
import pytest

from fedjax_llm.data import holdout, partition


def toy(**clients) -> datasets.Dataset:
  """So many records of each client, all different; kinds alternate."""
  return datasets.Dataset.from_list(
    [
      {"who": who, "text": f"{who} {i}", "kind": "ox"[i % 2]}
      for who, count in clients.items()
      for i in range(count)
    ]
  )


def divide(
  data, *, held_out=0.25, partitioner=None, client="who", label=None, seed=0
):
  partitioner = partitioner or partition.natural()
  return holdout.divide(data, partitioner, client, label, held_out, seed)


def texts(side):
  """The records of each client."""
  return {name: side.data[own]["text"] for name, own in side.clients.items()}


def test_clients_hold_out_a_share_of_their_own_records():
  train, rest, names = divide(toy(bob=8, ann=3, eve=1, joe=40))
  counts = lambda side: {name: len(own) for name, own in side.clients.items()}
  # At least one, but of one record none.
  assert counts(rest) == {"ann": 1, "bob": 2, "eve": 0, "joe": 10}
  assert counts(train) == {"ann": 2, "bob": 6, "eve": 1, "joe": 30}
  assert names == () and train.labels is None
  learnt, kept = texts(train), texts(rest)
  for name, count in {"bob": 8, "ann": 3, "eve": 1, "joe": 40}.items():
    both = [*learnt[name], *kept[name]]
    assert sorted(both) == sorted(f"{name} {i}" for i in range(count))


def test_what_a_client_holds_out_depends_on_it_and_the_seed_alone():
  few, many = toy(ann=20, bob=20), toy(joe=5, ann=20, eve=2, bob=20)
  kept, same = (texts(divide(data)[1]) for data in (few, many))
  assert {name: same[name] for name in kept} == kept
  numbers = [{text.split()[-1] for text in own} for own in kept.values()]
  assert numbers[0] != numbers[1]
  assert texts(divide(few, seed=1)[1]) != kept


def test_held_out_may_be_another_data_set_or_what_the_partition_leaves():
  data = toy(ann=6, bob=6, eve=2)
  train, rest, _ = divide(data, held_out=toy(joe=5))
  assert {name: len(own) for name, own in train.clients.items()} == {
    "ann": 6, "bob": 6, "eve": 2
  }  # fmt: skip
  assert texts(rest) == {"held_out": [f"joe {i}" for i in range(5)]}
  train, rest, _ = divide(
    data,
    held_out="left_out",
    partitioner=partition.natural(minimum_examples=3),
  )
  assert list(train.clients) == ["ann", "bob"]
  assert texts(rest) == {"held_out": ["eve 0", "eve 1"]}


def test_a_partition_is_of_ids_else_of_labels_else_of_a_number():
  data = toy(ann=6, bob=4)
  seen = []

  def partitioner(values):
    seen.append(values.tolist())
    return partition.iid(clients=2, seed=0)(values)

  for client, label in (("who", "kind"), (None, "kind"), (None, None)):
    divide(data, partitioner=partitioner, client=client, label=label)
  ids, labels, nothing = seen
  assert ids == ["ann"] * 6 + ["bob"] * 4
  assert labels == [0, 1] * 5
  assert len(nothing) == 10


def test_label_numbers_are_those_of_the_features_or_the_order():
  data = toy(ann=4)
  numbers, names = holdout.labels_of(data, "kind")
  assert names == ("o", "x") and numbers.tolist() == [0, 1, 0, 1]
  assert numbers.dtype == np.int32
  named = data.cast_column("kind", datasets.ClassLabel(names=["x", "y", "o"]))
  numbers, names = holdout.labels_of(named, "kind")
  assert names == ("x", "y", "o") and numbers.tolist() == [2, 0, 2, 0]
  # Of what is held out, they are those of what is trained on.
  numbers, _ = holdout.labels_of(data, "kind", names)
  assert numbers.tolist() == [2, 0, 2, 0]
  counted = datasets.Dataset.from_dict({"kind": [10, 9]})
  numbers, names = holdout.labels_of(counted, "kind")
  assert names == ("9", "10") and numbers.tolist() == [1, 0]
  assert holdout.labels_of(data, None) == (None, ())


def test_a_record_may_have_several_labels():
  data = datasets.Dataset.from_dict({"kind": [["o"], ["x", "o"], [], ["z"]]})
  labels, names = holdout.labels_of(data, "kind")
  expected = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]])
  assert names == ("o", "x", "z") and labels.dtype == np.float32
  np.testing.assert_array_equal(labels, expected)
  named = data.cast_column(
    "kind", datasets.List(datasets.ClassLabel(names=["x", "o", "z"]))
  )
  labels, _ = holdout.labels_of(named, "kind")
  np.testing.assert_array_equal(labels, expected[:, [1, 0, 2]])


@pytest.mark.parametrize("held_out", [1.0, 0.0, -0.5, 1, "none", None])
def test_other_ways_to_hold_out_are_refused(held_out):
  with pytest.raises(ValueError, match=f"'left_out', got {held_out!r}"):
    divide(toy(ann=4), held_out=held_out)


def test_columns_that_are_not_there_or_have_no_value_are_refused():
  data = toy(ann=4)
  with pytest.raises(ValueError, match="'name', got 'who', 'text', 'kind'"):
    divide(data, client="name")
  with pytest.raises(ValueError, match="column 'sort', got 'who'"):
    divide(data, label="sort")
  holes = datasets.Dataset.from_dict({"who": ["ann", None]})
  with pytest.raises(ValueError, match="every row of column 'who'.*filter"):
    divide(holes)
  with pytest.raises(ValueError, match="every row of column 'who'"):
    holdout.column_of(holes.select([]), "who")
  other = toy(ann=3).map(lambda row: {"kind": row["kind"].upper()})
  with pytest.raises(ValueError, match="got .'O', 'X'. in column 'kind'"):
    divide(data, label="kind", held_out=other)
