"""From a data set and a partition to the rows that clients train on.

What an experiment is given is a `RowSource`: it makes the rows once the model's
tokenizer is known. For example, Dolly as the ten clients of Shepherd, each
holding out a tenth:

  records.instructions(
    sources.load("dolly15k_fed10/local_training_*.json"),
    templates.dolly(),
    partition.natural(),
    client_column="file",
  )
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import datasets
import numpy as np
import transformers

from fedjax_llm.data import (
  batches,
  corpora,
  holdout,
  partition,
  sources,
  templates,
  tokenised,
)


class Split(NamedTuple):
  """What is trained on and what is not.

  Attributes:
    train: the clients and their rows.
    held_out: of the same clients, of whom some may have no rows; or one owner
      "held_out" of all rows.
    identity: what tells these rows from others, for a record.
  """

  train: batches.Population
  held_out: batches.Population
  identity: Mapping[str, str]


# From the tokenizer and the length of a row, in predictions or, for a
# classifier, in tokens.
RowSource = Callable[[transformers.PreTrainedTokenizerBase, int], Split]
# From the numbers of a client's records to their rows and what was kept.
_Make = Callable[[np.ndarray], tuple[Any, np.ndarray]]


def streams(
  corpus: corpora.Corpus, held_out_rows: int | None = None
) -> RowSource:
  """The texts of a corpus, each client's as one stream.

  Args:
    corpus: the clients' texts.
    held_out_rows: of each client at most so many, the first; None for all.

  Returns:
    A source that raises a `ValueError` if a client has nothing to predict.
  """

  def rows(tokenizer, sequence_length):
    return Split(
      batches.population(corpus, tokenizer, sequence_length),
      batches.held_out(corpus, tokenizer, sequence_length, held_out_rows),
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
  """Prompts with answers, for a language model.

  Args:
    data: the records of all clients.
    template: from a record to its prompt and answer.
    partitioner: divides the records by the values of `client_column`, else of
      `label_column`, else, as for `partition.iid`, by their number alone.
    client_column: of natural ids.
    label_column: of labels, names or numbers; every row gets its own, unless
      `packing` puts several in a row.
    held_out: the fraction in (0, 1) that every client holds out of its records,
      drawn by its name and `seed`, but never the only one; or another data set
      of the same columns; or "left_out", what the partition leaves out.
    held_out_rows: of each client at most so many, the first; None for all.
    loss_on: "answers" or "everything".
    packing: whether short records share rows, see `batches.Examples`.
    seed: of what is held out.

  Returns:
    A source of rows. A client without an answer to predict in a row's length
    is left out. The source raises a `ValueError` if none is left.

  Raises:
    ValueError: if a column is missing or a value not one of the above.
  """
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
  """Texts with labels, for a classifier.

  The arguments and errors are those of `instructions`, but for:

  Args:
    data: the records of all clients.
    template: from a record to its text, a prompt with its answer.
    partitioner: as in `instructions`; where a text may have several labels, it
      divides by `client_column` or by number alone.
    label_column: of labels, names or numbers; or of lists of them, where a text
      may have several.
    client_column: of natural ids.
    held_out: as in `instructions`.
    held_out_rows: of each client at most so many, the first; None for all.
    seed: of what is held out.
  """
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


def _whole(text: templates.Text) -> templates.Text:
  """A text to read all at once; special tokens are put round it later."""
  return templates.Text("", text.prompt + text.answer, special_tokens=False)


def _split(
  train: holdout.Side,
  rest: holdout.Side,
  make: Callable[[holdout.Side], _Make],
  names: tuple[str, ...],
  held_out_rows: int | None,
) -> Split:
  """The rows of both sides; clients without any to train on are left out."""
  if held_out_rows is not None and held_out_rows < 1:
    raise ValueError(
      f"expected held_out_rows >= 1 or None for all, got {held_out_rows=}."
    )
  of_train = make(train)
  of_rest = of_train if rest.data is train.data else make(rest)
  made = {name: of_train(owned) for name, owned in train.clients.items()}
  made = {name: rows for name, rows in made.items() if rows[1].size}
  if rest.clients.keys() == train.clients.keys():
    rest = rest._replace(clients={name: rest.clients[name] for name in made})
  held_out = {name: of_rest(owned) for name, owned in rest.clients.items()}
  count = sum(kept.size for _, kept in held_out.values())
  if not made or not count:
    raise ValueError(
      "expected records to train on and to hold out with something to learn,"
      f" got {len(made)} clients that train and {count} records held out. Take"
      " longer rows, fewer clients or more data."
    )
  populations = (
    _population(train, made, names),
    _population(rest, held_out, names, held_out_rows),
  )
  rows = {"rows": _fingerprint(*populations)}
  return Split(*populations, sources.identity(train.data) | rows)


def _population(
  side: holdout.Side,
  made: Mapping[str, tuple[Any, np.ndarray]],
  names: tuple[str, ...],
  rows_per_client: int | None = None,
) -> batches.Population:
  parts = [batches.head(rows, rows_per_client) for rows, _ in made.values()]
  records = [kept for _, kept in made.values()]
  labels = None
  if side.labels is not None and side.labels.ndim == 1:
    shown = [kept[:rows_per_client] for kept in records]
    labels = side.labels[np.concatenate(shown)]
  return batches.Population(
    tuple(made),
    batches.concatenate(parts),
    np.cumsum([0, *(len(rows.tokens) for rows in parts)]),
    labels,
    names,
    sum(map(len, side.clients.values())) - sum(map(len, records)),
  )


def _fingerprint(*populations: batches.Population) -> str:
  """SHA-256 of all rows and of who owns them."""
  digest = hashlib.sha256()
  for names, examples, starts, labels, label_names, _ in populations:
    digest.update(json.dumps([names, label_names]).encode())
    for leaf in (*examples, starts, labels):
      if leaf is not None:
        digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
  return digest.hexdigest()
