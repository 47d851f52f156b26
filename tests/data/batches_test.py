import logging

import hypothesis
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import strategies
from tokenizers import models, pre_tokenizers, processors, trainers

from fedjax_llm.data import batches, corpora

TEXTS = strategies.lists(strategies.text(max_size=30), max_size=6)


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "bos_eos"])
def tokenizer(request) -> transformers.PreTrainedTokenizerFast:
  """A byte-level BPE with tokens for the ends of a text, or without."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.train_from_iterator(
    ["the client sends what the server asks", "the cat sat on the mat"],
    trainers.BpeTrainer(
      vocab_size=280,
      special_tokens=["<s>", "</s>"],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  if request.param:
    bpe.post_processor = processors.TemplateProcessing(
      single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe, model_max_length=4
  )


def corpus(**texts) -> corpora.Corpus:
  clients = [
    corpora.Client(name, tuple(train), tuple(held_out))
    for name, (train, held_out) in texts.items()
  ]
  return corpora.Corpus("toy", tuple(clients), "")


@hypothesis.given(texts=TEXTS, sequence_length=strategies.integers(1, 9))
def test_every_token_is_predicted_once_after_the_one_before(
  tokenizer, texts, sequence_length
):
  stream = [token for text in texts for token in tokenizer.encode(text)]
  tokens, mask = batches.rows_of_text(texts, tokenizer, sequence_length)
  assert tokens.dtype == np.int32 and mask.dtype == bool
  assert tokens.shape == (len(mask), sequence_length + 1)
  assert mask.shape == (len(tokens), sequence_length)
  pairs = np.stack([tokens[:, :-1][mask], tokens[:, 1:][mask]], axis=1).tolist()
  assert pairs == [list(pair) for pair in zip(stream, stream[1:], strict=False)]


@hypothesis.given(texts=TEXTS, sequence_length=strategies.integers(1, 9))
def test_only_the_end_of_the_last_row_is_padding(
  tokenizer, texts, sequence_length
):
  tokens, mask = batches.rows_of_text(texts, tokenizer, sequence_length)
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
  toy = corpus(
    ann=(["the cat", "sat"], ["on the mat"]),
    bob=(["the server asks what the client sends"], ["the mat sat"]),
  )
  for name, result in {
    "train": batches.population(toy, tokenizer, 3),
    "held_out": batches.held_out(toy, tokenizer, 3),
  }.items():
    assert result.names == ("ann", "bob")
    assert result.starts.dtype == np.int64
    assert result.starts[0] == 0
    assert result.starts[-1] == len(result.examples.tokens)
    for i, client in enumerate(toy.clients):
      own = slice(*result.starts[i : i + 2])
      rows = batches.rows_of_text(getattr(client, name), tokenizer, 3)
      for part, whole in zip(rows, result.examples, strict=True):
        np.testing.assert_array_equal(part, whole[own])


def test_held_out_keeps_the_first_rows_of_each_client(tokenizer):
  toy = corpus(
    ann=(["sat"], ["the client sends"]), bob=(["sat"], ["on the mat, the cat"])
  )
  whole = batches.held_out(toy, tokenizer, 2)
  some = batches.held_out(toy, tokenizer, 2, rows_per_client=1)
  np.testing.assert_array_equal(some.starts, [0, 1, 2])
  for part, leaf in zip(some.examples, whole.examples, strict=True):
    np.testing.assert_array_equal(part, leaf[whole.starts[:-1]])


def test_bad_values_are_named(data):
  llama = transformers.AutoTokenizer.from_pretrained(data / "stories260k")
  toy = corpus(ann=(["the cat"], []), bob=([], ["the mat"]))
  with pytest.raises(ValueError, match="'bob'.*Leave"):
    batches.population(toy, llama, 4)
  with pytest.raises(ValueError, match="'ann'.*Leave"):
    batches.held_out(toy, llama, 4)
  with pytest.raises(ValueError, match="rows_per_client=0"):
    batches.held_out(toy, llama, 4, rows_per_client=0)
  with pytest.raises(ValueError, match="sequence_length=0"):
    batches.rows_of_text(["the cat"], llama, 0)
