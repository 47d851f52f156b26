"""Makes the rows that clients train on from a data set and a partition.

An experiment takes a `RowSource`, which makes the rows once the tokenizer of
the model is known. This example is Dolly with the ten clients of Shepherd. Each
client holds out a tenth of its records:

  records.instructions(
    sources.load("dolly15k_fed10/local_training_*.json"),
    templates.dolly(),
    partition.natural(),
    client_column="file",
  )
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedjax_llm.data import (
  batches,
  corpora,
  holdout,
  partition,
  sources,
  templates,
  tokenised,
)

if TYPE_CHECKING:
  import datasets
  import transformers


class Split(NamedTuple):
  """The rows for training and the rows that are held out.

  Attributes:
    train: the clients and their rows for training.
    held_out: the held-out rows of the same clients, some of which may have no
      rows; or one client "held_out" with all rows.
    identity: fingerprints of the data and of the rows, for the record of a run.
  """

  train: batches.Population
  held_out: batches.Population
  identity: Mapping[str, str]


# Called with the tokenizer and the length of a row: in predictions for a
# language model, in tokens for a classifier.
RowSource = Callable[["transformers.PreTrainedTokenizerBase", int], Split]
# Called with the numbers of a client's records; returns their rows, and the
# numbers of the records that have a row.
_Make = Callable[[np.ndarray], tuple[Any, np.ndarray]]


def streams(
  corpus: corpora.Corpus, held_out_rows: int | None = None
) -> RowSource:
  """Makes rows from a corpus; the texts of each client form one stream.

  Args:
    corpus: the clients and their texts.
    held_out_rows: largest number of held-out rows per client; None for all.

  Returns:
    A source of rows. It raises a `ValueError` if a client has no token to
    predict.

  Raises:
    ValueError: if `held_out_rows` is not positive.
  """
  _check_rows(held_out_rows)
  train = {client.name: client.train for client in corpus.clients}
  held_out = {client.name: client.held_out for client in corpus.clients}

  def rows(tokenizer, sequence_length):
    return Split(
      batches.population(train, tokenizer, sequence_length),
      batches.population(held_out, tokenizer, sequence_length, held_out_rows),
      corpora.identity(corpus),
    )

  return rows


def instructions(
  data: datasets.Dataset,
  template: templates.Template,
  partitioner: partition.Partitioner,
  *,
  client_column: str | None = None,
  label_column: str | None = None,
  held_out: holdout.HeldOut = 0.1,
  held_out_rows: int | None = None,
  loss_on: batches.LossOn = "answers",
  packing: bool = False,
  seed: int = 0,
) -> RowSource:
  """Makes rows from prompts with answers, for a language model.

  Args:
    data: the records of all clients.
    template: function from a record to its prompt and answer.
    partitioner: function that divides the records among clients. It gets the
      values of `client_column`, or else those of `label_column`, or else zeros.
    client_column: name of a column with the ids of natural clients, or None.
    label_column: name of a column with labels (names or numbers), or None. With
      `packing` the rows have no labels.
    held_out: what is held out: a fraction in (0, 1) of each client's records,
      drawn by `seed` and the client's name; another data set with the same
      columns; or "left_out", the records that the partition leaves out. With a
      fraction, a client with one record holds out none.
    held_out_rows: largest number of held-out rows per client; None for all.
    loss_on: tokens that count in the loss: "answers" or "everything".
    packing: whether short records share rows; see `batches.Examples`.
    seed: seed of the held-out records.

  Returns:
    A source of rows. It leaves out clients without an answer that fits in a
    row. It raises a `ValueError` if no client is left.

  Raises:
    ValueError: if a column is missing, or an argument has an unknown value.
  """
  _check_rows(held_out_rows)
  train, rest, names = holdout.divide(
    data, partitioner, client_column, label_column, held_out, seed
  )
  if packing:
    train, rest = (side._replace(labels=None) for side in (train, rest))

  def rows(tokenizer, sequence_length):
    def make(side):
      records = tokenised.tokenise(map(template, side.data), tokenizer)
      return lambda chosen: batches.rows_of_records(
        records, chosen, sequence_length, loss_on=loss_on, packing=packing
      )

    return _split(train, rest, make, names, held_out_rows)

  return rows


def classified(
  data: datasets.Dataset,
  template: templates.Template,
  partitioner: partition.Partitioner,
  *,
  label_column: str = "label",
  client_column: str | None = None,
  held_out: holdout.HeldOut = 0.1,
  held_out_rows: int | None = None,
  seed: int = 0,
) -> RowSource:
  """Makes rows from texts with labels, for a classifier.

  Args:
    data: the records of all clients.
    template: function from a record to its text, a prompt with its answer.
    partitioner: as in `instructions`. If texts have several labels, it gets the
      values of `client_column`, or else zeros.
    label_column: name of a column with labels (names or numbers). If a text may
      have several labels, the column has lists of them.
    client_column: name of a column with the ids of natural clients, or None.
    held_out: as in `instructions`.
    held_out_rows: largest number of held-out rows per client; None for all.
    seed: seed of the held-out records.

  Returns:
    A source of rows. It leaves out clients without text, and raises a
    `ValueError` if no client is left.

  Raises:
    ValueError: if a column is missing, or an argument has an unknown value.
  """
  _check_rows(held_out_rows)
  train, rest, names = holdout.divide(
    data, partitioner, client_column, label_column, held_out, seed
  )

  def rows(tokenizer, sequence_length):
    special_tokens = tokenised.special_tokens(tokenizer)

    def make(side):
      texts = [_whole(template(row)) for row in side.data]
      records = tokenised.tokenise(texts, tokenizer, end=False)
      return lambda chosen: batches.labelled_rows(
        records,
        chosen,
        side.labels,
        sequence_length,
        special_tokens=special_tokens,
      )

    return _split(train, rest, make, names, held_out_rows)

  return rows


def _check_rows(held_out_rows: int | None) -> None:
  if held_out_rows is not None and held_out_rows < 1:
    raise ValueError(
      f"expected held_out_rows >= 1 or None for all, got {held_out_rows=}."
    )


def _whole(text: templates.Text) -> templates.Text:
  """Joins prompt and answer; the special tokens are added later."""
  return templates.Text("", text.prompt + text.answer, special_tokens=False)


def _split(
  train: holdout.Side,
  rest: holdout.Side,
  make: Callable[[holdout.Side], _Make],
  names: tuple[str, ...],
  held_out_rows: int | None,
) -> Split:
  """Makes the rows of both sides; drops clients without rows to train on."""
  make_train = make(train)
  make_rest = make_train if rest.data is train.data else make(rest)
  made = {name: make_train(owned) for name, owned in train.clients.items()}
  made = {name: rows for name, rows in made.items() if rows[1].size}
  if rest.clients.keys() == train.clients.keys():
    rest = rest._replace(clients={name: rest.clients[name] for name in made})
  held_out = {name: make_rest(owned) for name, owned in rest.clients.items()}
  count = sum(kept.size for _, kept in held_out.values())
  if not made or not count:
    raise ValueError(
      "expected records to train on and records to hold out, got"
      f" {len(made)} clients that train and {count} held-out records with"
      " something to learn. Take longer rows, fewer clients or more data."
    )
  populations = (
    _population(train, made, names),
    _population(rest, held_out, names, held_out_rows),
  )
  identity = {
    "fingerprint": sources.fingerprint(train.data),
    "rows": _fingerprint(*populations),
  }
  return Split(*populations, identity)


def _population(
  side: holdout.Side,
  made: Mapping[str, tuple[Any, np.ndarray]],
  names: tuple[str, ...],
  rows_per_client: int | None = None,
) -> batches.Population:
  records = [kept for _, kept in made.values()]
  labels = None
  if side.labels is not None and side.labels.ndim == 1:
    shown = [kept[:rows_per_client] for kept in records]
    labels = side.labels[np.concatenate(shown)]
  return batches.join(
    {name: rows for name, (rows, _) in made.items()},
    rows_per_client,
    labels=labels,
    label_names=names,
    dropped=sum(map(len, side.clients.values())) - sum(map(len, records)),
  )


def _fingerprint(*populations: batches.Population) -> str:
  """Returns the SHA-256 of all rows and of their owners."""
  digest = hashlib.sha256()
  for names, examples, starts, labels, label_names, _ in populations:
    digest.update(json.dumps([names, label_names]).encode())
    for leaf in (*examples, starts, labels):
      if leaf is not None:
        digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
  return digest.hexdigest()
