import json
import shutil

import datasets
import numpy as np
import pytest

from fedjax_llm.data import (
  batches,
  corpora,
  partition,
  records,
  sources,
  templates,
)

LENGTH = 24
TEMPLATE = templates.question_answer("q", "a")


def toy(**clients) -> datasets.Dataset:
  """So many records of each client, all different; kinds alternate."""
  return datasets.Dataset.from_list(
    [
      {"who": who, "q": f"{i}", "a": f"the {who} {i}", "kind": "ox"[i % 2]}
      for who, count in clients.items()
      for i in range(count)
    ]
  )


def instructions(data, **options):
  options = {"client_column": "who", "held_out": 0.25} | options
  return records.instructions(data, TEMPLATE, partition.natural(), **options)


def texts(population, tokenizer):
  """What stands in the rows of each client."""
  decode = lambda row: tokenizer.decode(row[row > 0], skip_special_tokens=True)
  return {
    name: [decode(row) for row in population.examples.tokens[start:end]]
    for name, start, end in zip(
      population.names, population.starts, population.starts[1:], strict=False
    )
  }


def assert_equal(left, right):
  assert left.names == right.names and left.dropped == right.dropped
  np.testing.assert_array_equal(left.starts, right.starts)
  for a, b in zip(left.examples, right.examples, strict=True):
    np.testing.assert_array_equal(a, b)


def test_streams_are_the_rows_of_a_corpus(llama):
  corpus = corpora.Corpus(
    "toy",
    (
      corpora.Client("ann", ("the cat " * 30,), ("sat " * 60, "on")),
      corpora.Client("bob", ("a mat",), ("in a hat " * 40,)),
    ),
    "print",
  )
  train, held_out, identity = records.streams(corpus)(llama, 16)
  ann, bob = corpus.clients
  texts = {"ann": ann.train, "bob": bob.train}
  assert_equal(train, batches.population(texts, llama, 16))
  texts = {"ann": ann.held_out, "bob": bob.held_out}
  assert_equal(held_out, batches.population(texts, llama, 16))
  assert identity == {"name": "toy", "fingerprint": "print"}
  some = records.streams(corpus, held_out_rows=2)(llama, 16)
  assert_equal(some.held_out, batches.population(texts, llama, 16, 2))
  with pytest.raises(ValueError, match="held_out_rows=0"):
    records.streams(corpus, held_out_rows=0)


def test_clients_train_on_some_of_their_records_and_hold_out_the_rest(gpt2):
  data = toy(bob=8, ann=3, eve=1, joe=40)
  train, held_out, _ = instructions(data)(gpt2, LENGTH)
  assert train.names == held_out.names == ("ann", "bob", "eve", "joe")
  assert np.diff(train.starts).tolist() == [2, 6, 1, 30]
  assert np.diff(held_out.starts).tolist() == [1, 2, 0, 10]
  assert train.dropped == held_out.dropped == 0
  learnt, kept = texts(train, gpt2), texts(held_out, gpt2)
  for name in train.names:
    own = [row for row in data if row["who"] == name]
    expected = [f"Question: {row['q']}\nAnswer: {row['a']}" for row in own]
    assert sorted(learnt[name] + kept[name]) == sorted(expected)
    for part in (learnt[name], kept[name]):
      assert part == [text for text in expected if text in part]


def test_only_answers_count_unless_everything_does(gpt2):
  data = toy(ann=4, bob=4)
  for loss_on, prompts in {"answers": False, "everything": True}.items():
    train, *_ = instructions(data, loss_on=loss_on)(gpt2, LENGTH)
    for tokens, mask in zip(*train.examples[:2], strict=True):
      learnt = gpt2.decode(tokens[1:][mask])
      assert learnt.startswith(": " if prompts else " the ")
      assert learnt.endswith("<|endoftext|>")


def test_records_without_an_answer_in_reach_are_dropped_and_counted(gpt2):
  rows = [
    {"who": who, "q": question, "a": answer}
    for who, question, answer in [
      *[("ann", "short", "yes")] * 6,
      *[("ann", "long " * LENGTH, "yes")] * 2,
      *[("bob", "short", "yes " * LENGTH)] * 4,
      *[("eve", "long " * LENGTH, "yes")] * 5,
    ]
  ]
  plain = lambda row: templates.Text(row["q"], " " + row["a"])
  train, held_out, _ = records.instructions(
    sources.load([*rows, {"who": "bob", "q": "short", "a": " "}]),
    plain,
    partition.natural(),
    client_column="who",
    held_out=0.25,
  )(gpt2, LENGTH)
  assert train.names == held_out.names == ("ann", "bob")
  everything = [train, held_out]
  owned = sum(len(part.examples.tokens) for part in everything)
  assert owned == 6 + 4
  # Of eve, whom nothing is left to train, nothing is held out either.
  assert sum(part.dropped for part in everything) == 2 + 1 + 4
  for part in everything:
    assert part.examples.mask.any(axis=1).all()


def test_held_out_may_be_another_data_set_or_what_the_partition_leaves(gpt2):
  data = toy(ann=6, bob=6, eve=2)
  separate = instructions(data, held_out=toy(joe=5), held_out_rows=3)
  train, held_out, _ = separate(gpt2, LENGTH)
  assert np.diff(train.starts).tolist() == [6, 6, 2]
  assert held_out.names == ("held_out",)
  assert [text[-5:] for text in texts(held_out, gpt2)["held_out"]] == [
    *("joe 0", "joe 1", "joe 2")
  ]
  train, held_out, _ = records.instructions(
    data,
    TEMPLATE,
    partition.natural(minimum_examples=3),
    client_column="who",
    held_out="left_out",
  )(gpt2, LENGTH)
  assert train.names == ("ann", "bob")
  assert [text[-5:] for text in texts(held_out, gpt2)["held_out"]] == [
    *("eve 0", "eve 1")
  ]


def test_held_out_rows_are_the_first_of_each_client(gpt2):
  data = toy(ann=20, bob=8, eve=1)
  whole = instructions(data)(gpt2, LENGTH).held_out
  some = instructions(data, held_out_rows=3)(gpt2, LENGTH).held_out
  assert np.diff(some.starts).tolist() == [3, 2, 0]
  for name, rows in texts(whole, gpt2).items():
    assert texts(some, gpt2)[name] == rows[:3]


def test_packed_rows_have_the_records_of_one_client(gpt2):
  data = toy(ann=20, bob=9)
  loose = instructions(data, label_column="kind")(gpt2, 40).train
  packed = instructions(data, label_column="kind", packing=True)(gpt2, 40).train
  assert packed.labels is None and packed.label_names == ("o", "x")
  assert len(packed.examples.tokens) < len(loose.examples.tokens) / 2
  assert packed.examples.mask.sum() == loose.examples.mask.sum()
  for name, rows in texts(packed, gpt2).items():
    assert sorted(texts(loose, gpt2)[name]) == sorted(
      f"Question: {part}"
      for row in rows
      for part in row.split("Question: ")[1:]
    )


def test_each_row_has_the_label_of_its_record(gpt2):
  data = toy(ann=7, bob=5)
  source = instructions(data, label_column="kind", held_out_rows=1)
  for population in source(gpt2, LENGTH)[:2]:
    rows = [x for own in texts(population, gpt2).values() for x in own]
    assert population.label_names == ("o", "x")
    assert population.labels.dtype == np.int32
    assert population.labels.tolist() == [int(row[-1]) % 2 for row in rows]
  assert instructions(data)(gpt2, LENGTH).train.labels is None


def test_identity_is_that_of_the_content_and_of_the_rows_in_any_folder(
  gpt2, llama, tmp_path
):
  (tmp_path / "here").mkdir()
  (tmp_path / "here" / "train.jsonl").write_text(
    "\n".join(map(json.dumps, toy(ann=9, bob=9)))
  )
  shutil.copytree(tmp_path / "here", tmp_path / "there")
  data = sources.load(tmp_path / "here")
  base = instructions(data)(gpt2, LENGTH).identity
  assert base == instructions(data)(gpt2, LENGTH).identity
  moved = sources.load(tmp_path / "there")
  assert base == instructions(moved)(gpt2, LENGTH).identity
  assert base["fingerprint"] == sources.fingerprint(data)
  others = [
    instructions(data)(llama, LENGTH),
    instructions(data)(gpt2, LENGTH + 1),
    *(
      instructions(data, **option)(gpt2, LENGTH)
      for option in (
        {"seed": 1},
        {"packing": True},
        {"loss_on": "everything"},
        {"held_out": 0.5},
        {"client_column": "kind"},
        {"label_column": "kind"},
      )
    ),
  ]
  prints = {split.identity["rows"] for split in others} | {base["rows"]}
  assert len(prints) == 1 + len(others)
  assert {split.identity["fingerprint"] for split in others} == {
    base["fingerprint"]
  }


def classified(data, **options):
  template = templates.plain("a")
  options = {"label_column": "kind", "client_column": "who"} | options
  return records.classified(data, template, partition.natural(), **options)


def test_texts_are_classified_by_the_names_of_their_labels(tokenizer):
  data = toy(ann=5, bob=3)
  train, held_out, _ = classified(data, held_out=0.4)(tokenizer, 40)
  assert train.label_names == held_out.label_names == ("o", "x")
  expected = {
    tuple(tokenizer.encode(row["a"])): "ox".index(row["kind"]) for row in data
  }
  found = {}
  for population in (train, held_out):
    rows = population.examples
    np.testing.assert_array_equal(population.labels, rows.labels, strict=True)
    for tokens, segments, label in zip(*rows, strict=True):
      found[tuple(tokens[segments > 0].tolist())] = label
  assert found == expected


def test_a_text_may_have_several_labels(tokenizer):
  kinds = [["o"], ["x", "o"], [], ["z"]]
  rows = [
    {"who": "ann", "a": f"the cat {i}", "kind": held}
    for i, held in enumerate(kinds)
  ]
  data = sources.load(rows)
  train, held_out, _ = classified(data, held_out=data)(tokenizer, 12)
  expected = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]]
  assert train.label_names == ("o", "x", "z") and train.labels is None
  for population in (train, held_out):
    assert population.examples.labels.dtype == np.float32
    assert population.examples.labels.tolist() == expected
  named = data.cast_column(
    "kind", datasets.List(datasets.ClassLabel(names=["x", "o", "z"]))
  )
  train, *_ = classified(named, held_out=data)(tokenizer, 12)
  assert (
    train.examples.labels.tolist() == np.array(expected)[:, [1, 0, 2]].tolist()
  )


def test_texts_without_a_token_are_dropped_and_counted(tokenizer):
  rows = [
    {"who": "ann", "a": text, "kind": "o"} for text in ["the cat", "", " ", "a"]
  ]
  data = sources.load(rows)
  train, held_out, _ = classified(data, held_out=data)(tokenizer, 12)
  assert train.dropped == held_out.dropped == 2
  assert len(train.examples.tokens) == len(train.examples.labels) == 2


def test_dolly_in_ten_clients(data, gpt2):
  folder = data / "dolly15k_fed10"
  dolly = sources.load(folder / "local_training_*.json")
  some = dolly.select(range(0, len(dolly), 60))
  source = records.instructions(
    some,
    templates.dolly(),
    partition.natural(),
    client_column="file",
    label_column="category",
    held_out=sources.load(folder / "global_test.json@train[:4]"),
  )
  train, held_out, _ = source(gpt2, 256)
  assert len(train.names) == 10 and len(train.label_names) == 8
  assert len(train.examples.tokens) + train.dropped == len(some)
  assert len(held_out.examples.tokens) + held_out.dropped == 4
  first = train.examples.tokens[0][: train.examples.mask[0].argmax() + 1]
  assert gpt2.decode(first).endswith("\n\n### Response:")


def test_without_anyone_to_train_or_anything_held_out_there_are_no_rows(gpt2):
  data = toy(ann=4, bob=4)
  with pytest.raises(ValueError, match="held_out_rows=0"):
    instructions(data, held_out_rows=0)(gpt2, LENGTH)
  with pytest.raises(
    ValueError, match="0 clients that train and 0 held-out records"
  ):
    instructions(data)(gpt2, 2)
  with pytest.raises(
    ValueError, match="2 clients that train and 0 held-out records"
  ):
    instructions(toy(ann=1, bob=1))(gpt2, LENGTH)
