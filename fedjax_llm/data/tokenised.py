"""Tokenises records once; later runs map the tokens from a file.

The name of the file is a hash of the rendered texts and the tokenizer, which
determine its content. If either changes, another file is made. The file does
not depend on the length of rows or on which tokens count.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedjax_llm.data import templates

if TYPE_CHECKING:
  import transformers

_VERSION = 1  # The version of the file format and of the tokenisation.
_CHUNK = 1000  # The number of texts in one call of the tokenizer.


class Tokenised(NamedTuple):
  """Records of different lengths, one after the other.

  Attributes:
    tokens: int32 [all tokens]; record `i` is `tokens[starts[i]:starts[i + 1]]`.
    starts: int64 [records + 1], the first token of each record and the end.
    prompts: int32 [records], the number of prompt tokens of each record.
  """

  tokens: np.ndarray
  starts: np.ndarray
  prompts: np.ndarray


def tokenise(
  texts: Iterable[templates.Text],
  tokenizer: transformers.PreTrainedTokenizerBase,
  *,
  end: bool = True,
) -> Tokenised:
  """Tokenises prompts and answers, or maps the file of an earlier call.

  A prompt is tokenised alone, as in generation, after the tokenizer's special
  tokens for the start of a text. The tokens of the answer are the rest of the
  tokens of prompt and answer together. If these do not begin with the prompt's
  tokens, because a token spans the border, the answer is tokenised alone. The
  answer ends with one end token if the tokenizer has one. A blank answer has no
  tokens at all.

  The files are in `tokens` in the folder that FEDJAX_LLM_CACHE names, by
  default `fedjax_llm` in the user's cache. They are written atomically. A
  damaged file is made again.

  Args:
    texts: the records.
    tokenizer: a fast tokenizer.
    end: whether answers end with the end token.

  Raises:
    ValueError: if the tokenizer is not fast, or the cache cannot be written.
  """
  if not tokenizer.is_fast:
    raise ValueError(
      f"expected a fast tokenizer, got {type(tokenizer).__name__}. Take a model"
      " with a tokenizer.json."
    )
  texts = list(texts)
  name = _fingerprint(texts, tokenizer, end)
  path = _cache_folder() / "tokens" / name
  found = _read(path)
  if found is None:
    fresh = _tokenise(texts, tokenizer, end)
    try:
      _write(path, fresh)
    except OSError as error:
      raise ValueError(
        f"expected a writable folder for tokens, got {path.parent}: {error}."
        " Set FEDJAX_LLM_CACHE to a writable folder."
      ) from error
    found = _read(path) or fresh
  return found


def special_tokens(
  tokenizer: transformers.PreTrainedTokenizerBase,
) -> tuple[list[int], list[int]]:
  """Returns the tokens that a tokenizer puts before and after a single text."""
  encoded = tokenizer("a", return_special_tokens_mask=True)
  ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
  first, last = special.index(0), len(ids) - special[::-1].index(0)
  return ids[:first], ids[last:]


def _tokenise(
  texts: Sequence[templates.Text],
  tokenizer: transformers.PreTrainedTokenizerBase,
  end: bool,
) -> Tokenised:
  before, _ = special_tokens(tokenizer)
  stop = tokenizer.eos_token_id if end else None
  pieces, lengths, prompts = [], [0], []
  for first in range(0, len(texts), _CHUNK):
    chunk = texts[first : first + _CHUNK]
    chunk_tokens = []
    for text, prompt, answer in zip(
      chunk, *_prompts_and_answers(chunk, tokenizer), strict=True
    ):
      if text.special_tokens:
        prompt = before + prompt
      if answer and stop is not None and answer[-1] != stop:
        answer = [*answer, stop]
      chunk_tokens += prompt + answer
      lengths.append(len(prompt) + len(answer))
      prompts.append(len(prompt))
    pieces.append(np.array(chunk_tokens, np.int32))
  return Tokenised(
    np.concatenate([np.zeros(0, np.int32), *pieces]),
    np.cumsum(lengths, dtype=np.int64),
    np.array(prompts, np.int32),
  )


def _prompts_and_answers(
  texts: Sequence[templates.Text],
  tokenizer: transformers.PreTrainedTokenizerBase,
) -> tuple[list[list[int]], list[list[int]]]:
  """Returns the tokens of prompts and answers, without added special tokens."""
  prompts = _ids([text.prompt for text in texts], tokenizer)
  wholes = _ids([text.prompt + text.answer for text in texts], tokenizer)
  answers: list[Any] = []
  for text, prompt, whole in zip(texts, prompts, wholes, strict=True):
    if not text.answer.strip():
      answers.append([])
    elif whole[: len(prompt)] == prompt:
      answers.append(whole[len(prompt) :])
    else:
      answers.append(None)
  alone = [i for i, answer in enumerate(answers) if answer is None]
  ids = _ids([texts[i].answer for i in alone], tokenizer)
  for i, answer in zip(alone, ids, strict=True):
    answers[i] = answer
  return prompts, answers


def _ids(
  texts: list[str], tokenizer: transformers.PreTrainedTokenizerBase
) -> list[list[int]]:
  if not texts:
    return []
  encoded: Any = tokenizer(texts, add_special_tokens=False, verbose=False)
  return encoded["input_ids"]


def _fingerprint(
  texts: Iterable[templates.Text],
  tokenizer: transformers.PreTrainedTokenizerBase,
  end: bool,
) -> str:
  """Returns the SHA-256 of everything that the tokens depend on."""
  tokenizer("")  # Resets the truncation and padding of the last call.
  pipeline = tokenizer.backend_tokenizer.to_str()
  settings = [_VERSION, end, tokenizer.eos_token_id, pipeline]
  digest = hashlib.sha256(json.dumps(settings).encode())
  for text in texts:
    digest.update(json.dumps(text).encode() + b"\n")
  return digest.hexdigest()


def _cache_folder() -> pathlib.Path:
  default = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  folder = os.environ.get("FEDJAX_LLM_CACHE") or f"{default}/fedjax_llm"
  return pathlib.Path(folder).expanduser()


def _write(path: pathlib.Path, tokenised: Tokenised) -> None:
  """Writes starts, prompts and tokens, after the SHA-256 of these three."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
    try:
      file.write(bytes(32))
      for leaf in (tokenised.starts, tokenised.prompts, tokenised.tokens):
        np.save(file, leaf)
      digest = _digest(file)
      file.seek(0)
      file.write(digest)
      file.flush()
      os.replace(file.name, path)
    except BaseException:
      os.unlink(file.name)
      raise


def _read(path: pathlib.Path) -> Tokenised | None:
  """Maps a file of `_write`; returns None if it is missing or damaged.

  Reads the whole file once to compare the hash.
  """
  if not path.is_file():
    return None
  with path.open("rb") as file:
    if file.read(32) != _digest(file):
      return None
    file.seek(32)
    starts, prompts = np.load(file), np.load(file)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    tokens = np.memmap(path, dtype, "r", offset=file.tell(), shape=shape)
  return Tokenised(tokens, starts, prompts)


def _digest(file: Any) -> bytes:
  """Returns the SHA-256 of everything after the first 32 bytes."""
  file.seek(32)
  return hashlib.file_digest(file, "sha256").digest()
