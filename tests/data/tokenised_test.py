import hypothesis
import numpy as np
import pytest
import transformers
from hypothesis import strategies
from tokenizers import decoders

from fedjax_llm.data import templates, tokenised

TEXTS = [
  templates.Text("the client", " sends"),
  templates.Text("", "the cat sat"),
  templates.Text("the mat", ""),
  templates.Text("the ser", "ver asks", special_tokens=False),
  templates.Text("the cat", " \n"),
]
STRINGS = strategies.text(
  strategies.sampled_from("the catsndrv\nüλ"), max_size=12
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path))
  return tmp_path / "tokens"


@pytest.fixture
def count(monkeypatch):
  """How often the tokenizer was needed."""
  calls = []
  original = tokenised._tokenise
  monkeypatch.setattr(
    tokenised,
    "_tokenise",
    lambda *arguments: calls.append(1) or original(*arguments),
  )
  return lambda: len(calls)


def assert_equal(left, right):
  for a, b in zip(left, right, strict=True):
    np.testing.assert_array_equal(a, b, strict=True)


def parts(records):
  """Prompt and answer of each record, as lists of tokens."""
  for i, prompt in enumerate(records.prompts):
    ids = records.tokens[records.starts[i] : records.starts[i + 1]].tolist()
    yield ids[:prompt], ids[prompt:]


def test_lengths_and_types_are_those_of_ragged_arrays(tokenizer):
  records = tokenised.tokenise(TEXTS, tokenizer)
  assert records.tokens.dtype == records.prompts.dtype == np.int32
  assert records.starts.dtype == np.int64
  assert records.starts.tolist()[0] == 0
  assert records.starts[-1] == records.tokens.size
  assert records.prompts.shape == (len(TEXTS),)
  empty = tokenised.tokenise([], tokenizer)
  assert [leaf.tolist() for leaf in empty] == [[], [0], []]


@hypothesis.settings(max_examples=40)
@hypothesis.given(
  pairs=strategies.lists(strategies.tuples(STRINGS, STRINGS), max_size=5)
)
def test_a_prompt_has_its_own_tokens_and_nothing_is_lost(tokenizer, pairs):
  tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
  texts = [templates.Text(*pair) for pair in pairs]
  end = tokenizer.eos_token_id
  start = [] if end is None else [tokenizer.bos_token_id]
  records = tokenised.tokenise(texts, tokenizer)
  for text, (prompt, answer) in zip(texts, parts(records), strict=True):
    alone = tokenizer.encode(text.prompt)
    assert prompt == (alone if end is None else alone[:-1])
    assert prompt[: len(start)] == start
    if not text.answer.strip():
      assert answer == []
      continue
    if end is not None:
      assert answer.pop() == end and end not in answer
    assert tokenizer.decode(answer) == text.answer


def test_the_border_is_that_of_the_whole_text_where_it_can_be(llama, gpt2):
  text = templates.Text("Once upon a time:", "there was a cat.")
  ((_, answer),) = parts(tokenised.tokenise([text], llama, end=False))
  prompt = llama(text.prompt)["input_ids"]
  assert prompt + answer == llama(text.prompt + text.answer)["input_ids"]
  # Alone, a text of this tokenizer starts with a space.
  assert answer != llama(text.answer, add_special_tokens=False)["input_ids"]
  text = templates.Text(" count", "ries")  # One token, " countries".
  ((prompt, answer),) = parts(tokenised.tokenise([text], gpt2, end=False))
  assert (prompt, answer) == (gpt2.encode(" count"), gpt2.encode("ries"))
  assert prompt + answer != gpt2.encode(" countries")


def test_special_tokens_are_the_tokenizers_unless_spelt_out(llama):
  texts = [
    templates.Text("Once", " there"),
    templates.Text("<s>Once", " there</s>", special_tokens=False),
  ]
  (first, then), (spelt, last) = parts(tokenised.tokenise(texts, llama))
  assert first[0] == spelt[0] == llama.bos_token_id
  assert first == llama("Once")["input_ids"]
  assert spelt.count(llama.bos_token_id) == 1
  for answer in (then, last):
    assert answer.count(llama.eos_token_id) == 1
    assert answer[-1] == llama.eos_token_id


def test_special_tokens_stand_where_the_tokenizer_puts_them(tokenizer, llama):
  ends = ([], []) if tokenizer.eos_token is None else ([0], [1])
  assert tokenised.special_tokens(tokenizer) == ends
  assert tokenised.special_tokens(llama) == ([llama.bos_token_id], [])


def test_chunks_do_not_show(tokenizer, folder, monkeypatch):
  texts = TEXTS * 3
  whole = tokenised.tokenise(texts, tokenizer)
  (path,) = folder.iterdir()
  path.unlink()
  monkeypatch.setattr(tokenised, "_CHUNK", 4)
  assert_equal(tokenised.tokenise(texts, tokenizer), whole)


def test_the_second_time_tokens_are_mapped_from_the_file(
  tokenizer, folder, count
):
  first = tokenised.tokenise(TEXTS, tokenizer)
  tokenizer(["the cat"], truncation=True, max_length=3)  # Leaves no trace.
  second = tokenised.tokenise(iter(TEXTS), tokenizer)
  assert count() == 1
  assert_equal(second, first)
  for records in (first, second):
    assert isinstance(records.tokens, np.memmap)
    assert records.tokens.mode == "r"
  assert len(list(folder.iterdir())) == 1


def test_all_that_tokens_depend_on_makes_another_file(
  tokenizer, llama, folder, count
):
  shorter = TEXTS[:-1]
  moved = [templates.Text("the clien", "t sends"), *TEXTS[1:]]
  spelt = [TEXTS[0]._replace(special_tokens=False), *TEXTS[1:]]
  for texts in (TEXTS, shorter, moved, spelt):
    tokenised.tokenise(texts, tokenizer)
  tokenised.tokenise(TEXTS, tokenizer, end=False)
  tokenised.tokenise(TEXTS, llama)
  ended = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer.backend_tokenizer, eos_token="t"
  )
  tokenised.tokenise(TEXTS, ended)
  assert count() == len(list(folder.iterdir())) == 7


@pytest.mark.parametrize(
  "damage",
  [
    lambda content: b"",
    lambda content: content[:-1],
    lambda content: content[:40],
    lambda content: content[:-1] + b"\xff",
    lambda content: bytes(32) + content[32:],
  ],
)
def test_a_damaged_file_is_made_again(tokenizer, folder, count, damage):
  first = tokenised.tokenise(TEXTS, tokenizer)
  first = tokenised.Tokenised(*map(np.array, first))
  (path,) = folder.iterdir()
  content = path.read_bytes()
  path.unlink()
  path.write_bytes(damage(content))
  assert_equal(tokenised.tokenise(TEXTS, tokenizer), first)
  assert count() == 2
  assert path.read_bytes() == content


def test_what_fails_halfway_leaves_nothing(tokenizer, folder, monkeypatch):
  def fail(file, leaf):
    file.write(b"half")
    raise OSError("disk full")

  with monkeypatch.context() as patch:
    patch.setattr(np, "save", fail)
    with pytest.raises(ValueError, match="disk full. Set FEDJAX_LLM_CACHE"):
      tokenised.tokenise(TEXTS, tokenizer)
  assert not list(folder.iterdir())
  assert tokenised.tokenise(TEXTS, tokenizer).prompts.size == len(TEXTS)


def test_the_cache_is_the_users_unless_told(monkeypatch, tmp_path, tokenizer):
  monkeypatch.delenv("FEDJAX_LLM_CACHE")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  tokenised.tokenise(TEXTS, tokenizer)
  assert len(list((tmp_path / "fedjax_llm" / "tokens").iterdir())) == 1


def test_a_slow_tokenizer_is_refused():
  slow = transformers.ByT5Tokenizer()
  with pytest.raises(ValueError, match="fast tokenizer, got ByT5Tokenizer"):
    tokenised.tokenise(TEXTS, slow)
