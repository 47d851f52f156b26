import logging

import hypothesis
import numpy as np
import pytest
import transformers
from hypothesis import strategies

from fedjax_llm.data import batches, tokenised

TEXTS = strategies.lists(strategies.text(max_size=30), max_size=6)


@hypothesis.given(texts=TEXTS, sequence_length=strategies.integers(1, 9))
def test_every_token_is_predicted_once_after_the_one_before(
  tokenizer, texts, sequence_length
):
  stream = [token for text in texts for token in tokenizer.encode(text)]
  tokens, mask, segments = batches.rows_of_text(
    texts, tokenizer, sequence_length
  )
  assert tokens.dtype == np.int32 and mask.dtype == bool and segments is None
  assert tokens.shape == (len(mask), sequence_length + 1)
  assert mask.shape == (len(tokens), sequence_length)
  pairs = np.stack([tokens[:, :-1][mask], tokens[:, 1:][mask]], axis=1).tolist()
  assert pairs == [list(pair) for pair in zip(stream, stream[1:], strict=False)]


@hypothesis.given(texts=TEXTS, sequence_length=strategies.integers(1, 9))
def test_only_the_end_of_the_last_row_is_padding(
  tokenizer, texts, sequence_length
):
  tokens, mask, _ = batches.rows_of_text(texts, tokenizer, sequence_length)
  assert mask[:-1].all()
  if len(mask):
    count = mask[-1].sum()
    assert count and mask[-1, :count].all()
    assert not tokens[-1, count + 1 :].any()


def test_special_tokens_are_the_tokenizers_own(data):
  llama = transformers.AutoTokenizer.from_pretrained(data / "stories260k")
  rows = batches.rows_of_text(["Once upon a time", "there was"], llama, 64)
  first, second = llama(["Once upon a time", "there was"])["input_ids"]
  stream = first + second
  assert first[0] == second[0] == llama.bos_token_id
  np.testing.assert_array_equal(rows.tokens[0, : len(stream)], stream)
  assert rows.mask.sum() == len(stream) - 1


def test_texts_longer_than_the_context_are_whole_and_silent(
  data, caplog, monkeypatch
):
  monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
  llama = transformers.AutoTokenizer.from_pretrained(data / "stories260k")
  text = "Once upon a time " * 500
  assert len(text) > llama.model_max_length
  rows = batches.rows_of_text([text], llama, 8)
  assert not caplog.records
  assert rows.mask.sum() == len(llama.encode(text, verbose=False)) - 1


def test_client_owns_its_rows_and_no_others(tokenizer):
  texts = {
    "ann": ["the cat", "sat"],
    "bob": ["the server asks what the client sends"],
  }
  result = batches.population(texts, tokenizer, 3)
  assert result.names == ("ann", "bob")
  assert result.starts.dtype == np.int64
  assert result.starts[0] == 0
  assert result.starts[-1] == len(result.examples.tokens)
  for i, own_texts in enumerate(texts.values()):
    own = slice(*result.starts[i : i + 2])
    rows = batches.rows_of_text(own_texts, tokenizer, 3)
    for part, whole in zip(rows[:2], result.examples[:2], strict=True):
      np.testing.assert_array_equal(part, whole[own])


def test_the_first_rows_of_each_client_are_kept(tokenizer):
  texts = {"ann": ["the client sends"], "bob": ["on the mat, the cat"]}
  whole = batches.population(texts, tokenizer, 2)
  some = batches.population(texts, tokenizer, 2, rows_per_client=1)
  np.testing.assert_array_equal(some.starts, [0, 1, 2])
  for part, leaf in zip(some.examples[:2], whole.examples[:2], strict=True):
    np.testing.assert_array_equal(part, leaf[whole.starts[:-1]])


def test_bad_values_are_named(data):
  llama = transformers.AutoTokenizer.from_pretrained(data / "stories260k")
  with pytest.raises(ValueError, match="'bob'.*Leave"):
    batches.population({"ann": ["the cat"], "bob": []}, llama, 4)
  with pytest.raises(ValueError, match="sequence_length=0"):
    batches.rows_of_text(["the cat"], llama, 0)


@strategies.composite
def records(draw) -> tokenised.Tokenised:
  """Records of tokens that are all different."""
  sizes = strategies.tuples(
    strategies.integers(0, 5), strategies.integers(0, 6)
  )
  parts = draw(strategies.lists(sizes, max_size=9))
  starts = np.cumsum([0, *map(sum, parts)])
  prompts = np.array([prompt for prompt, _ in parts], np.int32)
  return tokenised.Tokenised(
    np.arange(1, starts[-1] + 1, dtype=np.int32), starts, prompts
  )


RECORDS = dict(
  texts=records(),
  sequence_length=strategies.integers(1, 12),
  packing=strategies.booleans(),
  loss_on=strategies.sampled_from(["answers", "everything"]),
  order=strategies.randoms(),
)


def rows_of(texts, sequence_length, packing, loss_on, order):
  chosen = np.arange(len(texts.prompts))
  order.shuffle(chosen)
  return chosen, *batches.rows_of_records(
    texts, chosen, sequence_length, packing=packing, loss_on=loss_on
  )


@hypothesis.given(**RECORDS)
def test_what_counts_of_a_record_is_predicted_once_from_all_before_it(
  texts, sequence_length, packing, loss_on, order
):
  chosen, rows, kept = rows_of(texts, sequence_length, packing, loss_on, order)
  expected, expected_kept = [], []
  for record in chosen:
    start, end = texts.starts[record : record + 2]
    ids = list(texts.tokens[start:end])[: sequence_length + 1]
    prompt = texts.prompts[record]
    if any(place >= max(prompt, 1) for place in range(len(ids))):
      expected_kept.append(record)
      first = prompt if loss_on == "answers" else 0
      expected += [
        (ids[place], tuple(ids[:place]))
        for place in range(max(first, 1), len(ids))
      ]
  predicted = []
  for i in range(len(rows.tokens)):
    for t in range(sequence_length):
      if rows.mask[i, t]:
        seen = rows.tokens[i, : t + 1]
        if packing:
          assert rows.segments[i, t + 1] > 0
          seen = seen[rows.segments[i, : t + 1] == rows.segments[i, t + 1]]
        predicted.append((rows.tokens[i, t + 1], tuple(seen)))
  assert sorted(predicted) == sorted(expected)
  assert kept.tolist() == expected_kept


@hypothesis.given(**RECORDS)
def test_no_token_of_a_kept_record_is_lost_or_shared(
  texts, sequence_length, packing, loss_on, order
):
  _, rows, kept = rows_of(texts, sequence_length, packing, loss_on, order)
  assert rows.tokens.shape == (len(rows.mask), sequence_length + 1)
  assert rows.mask.shape == (len(rows.tokens), sequence_length)
  assert rows.tokens.dtype == np.int32 and rows.mask.dtype == bool
  assert rows.mask.any(axis=1).all()
  segments = (rows.tokens > 0).astype(np.int32)
  if packing:
    assert rows.segments.dtype == np.int32
    segments = rows.segments
  else:
    assert rows.segments is None
  np.testing.assert_array_equal(segments > 0, rows.tokens > 0)
  found = []
  for tokens, numbers in zip(rows.tokens, segments, strict=True):
    numbered = [n for n in numbers if n]
    assert numbered == sorted(numbered)
    assert set(numbered) == set(range(1, max(numbered) + 1))
    assert not numbers[len(numbered) :].any()
    found += [tokens[numbers == n].tolist() for n in sorted(set(numbered))]
  whole = [
    texts.tokens[texts.starts[record] : texts.starts[record + 1]]
    for record in kept
  ]
  cut = [ids[: sequence_length + 1].tolist() for ids in whole]
  assert sorted(found) == sorted(cut)
  if not packing:
    assert found == cut


@hypothesis.given(
  lengths=strategies.lists(strategies.integers(1, 10), max_size=20)
)
def test_packing_is_first_fit_decreasing(lengths):
  bins = []
  for length, record in sorted(
    ((length, record) for record, length in enumerate(lengths)),
    key=lambda pair: (-pair[0], pair[1]),
  ):
    for members in bins:
      if sum(lengths[other] for other in members) + length <= 10:
        members.append(record)
        break
    else:
      bins.append([record])
  expected = sorted(sorted(members) for members in bins)
  rows = batches.pack(np.array(lengths, np.int64), 10)
  count = max(rows, default=-1) + 1
  assert [np.flatnonzero(rows == row).tolist() for row in range(count)] == (
    expected
  )


@pytest.mark.parametrize("sequence_length", [3, 8, 40])
def test_labelled_rows_are_those_of_the_tokenizers_own_truncation(
  tokenizer, sequence_length
):
  texts = ["the cat sat on the mat", "sends", "", "what the server asks"]
  ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
  rows, kept = batches.labelled_rows(
    tokenised.Tokenised(
      np.array(sum(ids, []), np.int32),
      np.cumsum([0, *map(len, ids)]),
      np.zeros(4, np.int32),
    ),
    np.arange(4),
    np.array([3, 1, 4, 1], np.int32),
    sequence_length,
    special_tokens=tokenised.special_tokens(tokenizer),
  )
  assert kept.tolist() == [0, 1, 3]
  assert rows.labels.tolist() == [3, 1, 1]
  expected = tokenizer(
    [texts[i] for i in kept], truncation=True, max_length=sequence_length
  )["input_ids"]
  for tokens, segments, own in zip(*rows[:2], expected, strict=True):
    padding = [0] * (sequence_length - len(own))
    assert tokens.tolist() == own + padding
    assert segments.tolist() == [1] * len(own) + padding
  assert rows.tokens.dtype == rows.segments.dtype == np.int32


def test_values_that_make_no_rows_are_named():
  nothing = tokenised.Tokenised(*np.zeros((3, 1), np.int32))
  chosen = np.arange(0)
  with pytest.raises(ValueError, match="sequence_length=0"):
    batches.rows_of_records(nothing, chosen, 0)
  with pytest.raises(ValueError, match="'everything', got loss_on='prompts'"):
    batches.rows_of_records(nothing, chosen, 4, loss_on="prompts")
  with pytest.raises(
    ValueError, match="sequence_length > 2.*sequence_length=2"
  ):
    batches.labelled_rows(nothing, chosen, chosen, 2, special_tokens=([1], [2]))
