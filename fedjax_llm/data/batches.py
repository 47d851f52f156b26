"""Rows of tokens of one length; a mask marks the predictions that count.

The documents of a client, each with the tokenizer's special tokens, form one
stream, which is cut into rows. So only the last row of a client is padded. A
row may have the end of one document and the start of the next. Attention sees
both, as in the pretraining of language models.

A record is a prompt with its answer. It is never split over rows. A row has one
record, or several that attention keeps apart. Padding is token 0 on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

from fedjax_llm.data import tokenised

if TYPE_CHECKING:
  import transformers

LossOn = Literal["answers", "everything"]


class Examples(NamedTuple):
  """Rows of tokens for next-token prediction.

  Attributes:
    tokens: int32 [rows, sequence_length + 1].
    mask: bool [rows, sequence_length]; `mask[i, t]` is True if the prediction
      of `tokens[i, t + 1]` from `tokens[i, : t + 1]` counts.
    segments: int32 [rows, sequence_length + 1], the number of each token's
      record. Records of a row are numbered from 1; 0 is padding. Attention
      stays within a record. None if each row is one text.
  """

  tokens: np.ndarray
  mask: np.ndarray
  segments: np.ndarray | None = None


class Labelled(NamedTuple):
  """Rows of tokens for classification.

  Attributes:
    tokens: int32 [rows, sequence_length].
    segments: int32 [rows, sequence_length], 1 for text and 0 for padding.
    labels: int32 [rows]. If a row may have several labels, float32
      [rows, labels], 1 for each label of a row and 0 for the others.
  """

  tokens: np.ndarray
  segments: np.ndarray
  labels: np.ndarray


class Population(NamedTuple):
  """The rows of all clients in one array, which stays on the device.

  Attributes:
    names: the names of the clients.
    examples: the rows; client `i` owns the rows `starts[i]:starts[i + 1]`.
    starts: int64 [clients + 1], the first row of each client and the end.
    labels: int32 [rows], the label of each row; None if rows have no label.
    label_names: the names of the labels.
    dropped: the number of records that are left out, because the part that fits
      in a row has nothing to learn.
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
  """Tokenises and concatenates texts, and cuts them into rows.

  Neighbouring rows overlap by one token, so every token of the stream except
  the first is predicted exactly once. The padding of the last row does not
  count.

  Args:
    texts: the texts, in their order in the stream.
    tokenizer: the tokenizer. It adds only its configured special tokens.
    sequence_length: number of predictions in a row.

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
  """Puts records into rows; a record that is too long loses its end.

  Args:
    records: the prompts with answers.
    chosen: the numbers of the records to use, in order.
    sequence_length: number of predictions in a row.
    loss_on: tokens that count: "answers", or "everything" for prompts too. The
      first token of a record never counts, because nothing predicts it.
    packing: whether short records share rows, by first-fit-decreasing.

  Returns:
    The rows, in the order of their first records; and the records of `chosen`
    that have a row. A record has none if no token of its answer fits.

  Raises:
    ValueError: if `sequence_length` is not positive, or `loss_on` is unknown.
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
  """Packs records, the longest first, each into the first row with room.

  Args:
    lengths: the lengths of the records, at most `capacity` each.
    capacity: the length of a row.

  Returns:
    int64 [records], the row of each record. Rows are numbered in the order of
    their first records.
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
  """Makes one row for each text, with special tokens around the text.

  A text that is too long loses its end.

  Args:
    records: the texts, without special tokens.
    chosen: the numbers of the texts to use, in order.
    labels: the labels of all texts.
    sequence_length: number of tokens in a row.
    special_tokens: the tokens before and after a text; see
      `tokenised.special_tokens`.

  Returns:
    The rows; and the texts of `chosen` that have a row. Empty texts have none.

  Raises:
    ValueError: if `sequence_length` leaves no room for a text.
  """
  before, after = special_tokens
  room = sequence_length - len(before) - len(after)
  if room < 1:
    raise ValueError(
      f"expected sequence_length > {sequence_length - room}, the number of"
      f" special tokens, got {sequence_length=}. Take longer rows."
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


def join(
  clients: Mapping[str, Examples | Labelled],
  rows_per_client: int | None = None,
  **fields: Any,
) -> Population:
  """Makes a population from the rows of each client.

  Args:
    clients: the rows, by the name of the client.
    rows_per_client: largest number of rows per client; None for all.
    **fields: the other fields of the population.
  """
  parts = jax.tree.map(lambda x: x[:rows_per_client], [*clients.values()])
  examples = jax.tree.map(lambda *x: np.concatenate(x), *parts)
  starts = np.cumsum([0, *(len(rows.tokens) for rows in parts)])
  return Population(tuple(clients), examples, starts, **fields)


def population(
  texts: Mapping[str, Iterable[str]],
  tokenizer: transformers.PreTrainedTokenizerBase,
  sequence_length: int,
  rows_per_client: int | None = None,
) -> Population:
  """Makes a population from texts; the texts of each client form one stream.

  Args:
    texts: the texts of each client, by its name.
    tokenizer: the tokenizer.
    sequence_length: number of predictions in a row.
    rows_per_client: largest number of rows per client; None for all.

  Raises:
    ValueError: if a client has fewer than two tokens.
  """
  clients = {}
  for name, documents in texts.items():
    clients[name] = rows_of_text(documents, tokenizer, sequence_length)
    if not clients[name].mask.any():
      raise ValueError(
        f"expected two tokens or more for every client, got fewer for {name!r}."
        " Leave this client out of the corpus, or give it a longer text."
      )
  return join(clients, rows_per_client)


def _check_length(sequence_length: int) -> None:
  if sequence_length < 1:
    raise ValueError(f"expected sequence_length >= 1, got {sequence_length=}.")
