"""Tokenised text in rows of one shape: a mask says which predictions count.

The documents of a corpus, each with the special tokens of the tokenizer, follow
each other in one stream, which is cut into rows. So at most one row of a client
is padded, and a row may hold the end of one document and the start of the next:
attention sees both, as in the packing that language models are pretrained with.

Records, each a prompt with its answer, are never cut in two: a row holds one,
or several that do not see each other. All padding is token 0, on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np

from fedjax_llm.data import corpora, tokenised

if TYPE_CHECKING:
  import transformers

LossOn = Literal["answers", "everything"]


class Examples(NamedTuple):
  """Rows of tokens to predict one after the other.

  Attributes:
    tokens: int32 [rows, sequence_length + 1].
    mask: bool [rows, sequence_length]; `mask[i, t]` says whether predicting
      `tokens[i, t + 1]` from `tokens[i, : t + 1]` counts.
    segments: int32 [rows, sequence_length + 1], the number of a token's record
      in its row, from 1, and 0 for padding: tokens see their own record alone.
      None where a row is one text.
  """

  tokens: np.ndarray
  mask: np.ndarray
  segments: np.ndarray | None = None


class Labelled(NamedTuple):
  """Rows of tokens to classify.

  Attributes:
    tokens: int32 [rows, sequence_length].
    segments: int32 [rows, sequence_length], 1 for a text and 0 for padding.
    labels: int32 [rows]; or float32 [rows, labels] of 1 for those that hold and
      0 for the others, where several may.
  """

  tokens: np.ndarray
  segments: np.ndarray
  labels: np.ndarray


Rows = TypeVar("Rows", Examples, Labelled)


class Population(NamedTuple):
  """All clients' rows in one array, so that they stay on the device.

  Attributes:
    names: of the clients.
    examples: client `i` owns the rows `starts[i]:starts[i + 1]`.
    starts: int64 [clients + 1].
    labels: int32 [rows], where each row has one.
    label_names: what the labels stand for.
    dropped: how many records had nothing to learn in a row's length.
  """

  names: tuple[str, ...]
  examples: Examples | Labelled
  starts: np.ndarray
  labels: np.ndarray | None = None
  label_names: tuple[str, ...] = ()
  dropped: int = 0


def rows_of_text(
  texts: Iterable[str],
  tokenizer: transformers.PreTrainedTokenizerBase,
  sequence_length: int,
) -> Examples:
  """Tokenises, concatenates and cuts into rows that overlap by one token.

  Every token of the stream but the first is predicted exactly once. The last
  row is padded with token 0, whose prediction does not count.

  Args:
    texts: in the order in which they follow each other.
    tokenizer: adds the special tokens it is configured to add, and no others.
    sequence_length: predictions in a row.

  Raises:
    ValueError: if `sequence_length` is not positive.
  """
  _check_length(sequence_length)
  texts = list(texts)
  documents = tokenizer(texts, verbose=False)["input_ids"] if texts else []
  stream = np.array([token for ids in documents for token in ids], np.int32)
  predictions = max(0, stream.size - 1)
  starts = np.arange(0, predictions, sequence_length)
  padded = np.zeros(starts.size * sequence_length + 1, np.int32)
  padded[: stream.size] = stream
  positions = starts[:, None] + np.arange(sequence_length)
  tokens = padded[starts[:, None] + np.arange(sequence_length + 1)]
  return Examples(tokens, positions < predictions)


def rows_of_records(
  records: tokenised.Tokenised,
  chosen: np.ndarray,
  sequence_length: int,
  *,
  loss_on: LossOn = "answers",
  packing: bool = False,
) -> tuple[Examples, np.ndarray]:
  """Puts whole records into rows, cut at the end where they are too long.

  Args:
    records: prompts with answers.
    chosen: which of them, in this order.
    sequence_length: predictions in a row.
    loss_on: "answers", or "everything" for prompts too, but for the first
      token of a record, which nothing predicts.
    packing: whether short records share rows, by first-fit-decreasing.

  Returns:
    The rows, in the order of their first records; and those of `chosen` of
    which an answer's token is left to predict. The others are in no row.

  Raises:
    ValueError: if `sequence_length` is not positive, or `loss_on` neither of
      the two.
  """
  _check_length(sequence_length)
  if loss_on not in ("answers", "everything"):
    raise ValueError(
      f"expected loss_on 'answers' or 'everything', got {loss_on=}."
    )
  width = sequence_length + 1
  lengths = np.minimum(np.diff(records.starts)[chosen], width)
  kept = np.maximum(records.prompts[chosen], 1) < lengths
  chosen, lengths = chosen[kept], lengths[kept]
  rows = pack(lengths, width) if packing else np.arange(chosen.size)
  shape = (rows.max(initial=-1) + 1, width)
  tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  mask = np.zeros((shape[0], sequence_length), bool)
  ends = np.zeros(shape[0], np.int64)
  for record, row, length in zip(chosen, rows, lengths, strict=True):
    start, end = ends[row], ends[row] + length
    first = records.prompts[record] if loss_on == "answers" else 0
    source = records.starts[record]
    tokens[row, start:end] = records.tokens[source : source + length]
    segments[row, start:end] = segments[row].max() + 1
    mask[row, start + max(first, 1) - 1 : end - 1] = True
    ends[row] = end
  return Examples(tokens, mask, segments if packing else None), chosen


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
  """First-fit-decreasing: the longest first, each in the first row with room.

  Args:
    lengths: of the records, at most `capacity`.
    capacity: of a row.

  Returns:
    int64, the row of each record; rows are numbered by their first records.
  """
  rows = np.zeros(lengths.size, np.int64)
  room = np.full(lengths.size, capacity)
  used = 0
  for record in np.argsort(-lengths, kind="stable"):
    row = np.argmax(room[: used + 1] >= lengths[record])
    room[row] -= lengths[record]
    rows[record] = row
    used = max(used, row + 1)
  _, first, rows = np.unique(rows, return_index=True, return_inverse=True)
  return np.argsort(np.argsort(first))[rows]


def labelled_rows(
  records: tokenised.Tokenised,
  chosen: np.ndarray,
  labels: np.ndarray,
  sequence_length: int,
  *,
  special_tokens: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> tuple[Labelled, np.ndarray]:
  """A row for each text, between special tokens, cut at the end of the text.

  Args:
    records: texts without special tokens.
    chosen: which of them, in this order.
    labels: of all records.
    sequence_length: tokens in a row.
    special_tokens: before and after a text, see `tokenised.special_tokens`.

  Returns:
    The rows, and those of `chosen` that have a token. The others have no row.

  Raises:
    ValueError: if `sequence_length` leaves no room for a text.
  """
  before, after = special_tokens
  room = sequence_length - len(before) - len(after)
  if room < 1:
    raise ValueError(
      f"expected sequence_length > {sequence_length - room}, the number of"
      f" special tokens, got {sequence_length=}."
    )
  chosen = chosen[np.diff(records.starts)[chosen] > 0]
  tokens = np.zeros((chosen.size, sequence_length), np.int32)
  segments = np.zeros_like(tokens)
  for row, record in enumerate(chosen):
    start, end = records.starts[record : record + 2]
    text = records.tokens[start : min(end, start + room)]
    ids = [*before, *text.tolist(), *after]
    tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
  return Labelled(tokens, segments, labels[chosen]), chosen


def concatenate(parts: Sequence[Rows]) -> Rows:
  """The rows of all parts, which are of one kind."""
  leaves = (
    None if leaf[0] is None else np.concatenate(leaf)
    for leaf in zip(*parts, strict=True)
  )
  return type(parts[0])(*leaves)


def head(rows: Rows, count: int | None) -> Rows:
  """The first `count` rows, all of them if None."""
  leaves = (None if leaf is None else leaf[:count] for leaf in rows)
  return type(rows)(*leaves)


def population(
  corpus: corpora.Corpus,
  tokenizer: transformers.PreTrainedTokenizerBase,
  sequence_length: int,
) -> Population:
  """The rows that the clients of `corpus` train on.

  Raises:
    ValueError: if a client has nothing to predict.
  """
  texts = {client.name: client.train for client in corpus.clients}
  return _population(texts, tokenizer, sequence_length, None)


def held_out(
  corpus: corpora.Corpus,
  tokenizer: transformers.PreTrainedTokenizerBase,
  sequence_length: int,
  rows_per_client: int | None = None,
) -> Population:
  """The rows that the clients of `corpus` hold out.

  Args:
    corpus: with held-out texts for every client.
    tokenizer: as in `rows_of_text`.
    sequence_length: predictions in a row.
    rows_per_client: keep at most so many, the first, of each client.

  Raises:
    ValueError: if a client has nothing to predict.
  """
  if rows_per_client is not None and rows_per_client < 1:
    raise ValueError(
      f"expected rows_per_client >= 1 or None for all, got {rows_per_client=}."
    )
  texts = {client.name: client.held_out for client in corpus.clients}
  return _population(texts, tokenizer, sequence_length, rows_per_client)


def _population(
  texts: Mapping[str, Iterable[str]],
  tokenizer: transformers.PreTrainedTokenizerBase,
  sequence_length: int,
  rows_per_client: int | None,
) -> Population:
  clients = []
  for name, documents in texts.items():
    rows = rows_of_text(documents, tokenizer, sequence_length)
    if not rows.mask.any():
      raise ValueError(
        f"expected two tokens or more of every client, got fewer of {name!r}. "
        "Leave this client out of the corpus, or give it a longer text."
      )
    clients.append(head(rows, rows_per_client))
  starts = np.cumsum([0, *(len(rows.tokens) for rows in clients)])
  return Population(tuple(texts), concatenate(clients), starts)


def _check_length(sequence_length: int) -> None:
  if sequence_length < 1:
    raise ValueError(f"expected sequence_length >= 1, got {sequence_length=}.")
