"""Tokenised text in rows of one shape: a mask says which predictions count.

The documents of a client, each with the special tokens of the tokenizer, follow
each other in one stream, which is cut into rows. So at most one row of a client
is padded, and a row may hold the end of one document and the start of the next:
attention sees both, as in the packing that language models are pretrained with.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import transformers

from fedjax_llm.data import corpora


class Examples(NamedTuple):
  """Rows of tokens to predict one after the other.

  Attributes:
    tokens: int32 [rows, sequence_length + 1].
    mask: bool [rows, sequence_length]; `mask[i, t]` says whether predicting
      `tokens[i, t + 1]` from `tokens[i, : t + 1]` counts.
  """

  tokens: np.ndarray
  mask: np.ndarray


class Population(NamedTuple):
  """All clients' rows in one array, so that they stay on the device.

  Attributes:
    names: of the clients.
    examples: client `i` owns the rows `starts[i]:starts[i + 1]`.
    starts: int64 [clients + 1].
  """

  names: tuple[str, ...]
  examples: Examples
  starts: np.ndarray


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
  if sequence_length < 1:
    raise ValueError(f"expected sequence_length >= 1, got {sequence_length=}.")
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
    clients.append(Examples(*(leaf[:rows_per_client] for leaf in rows)))
  tokens, mask = map(np.concatenate, zip(*clients, strict=True))
  starts = np.cumsum([0, *(len(rows.tokens) for rows in clients)])
  return Population(tuple(texts), Examples(tokens, mask), starts)
