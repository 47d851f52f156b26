"""What `fedjax-llm evaluate` does, once arguments are parsed."""

import json
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from fedjax_llm.cli import examination
from fedjax_llm.data import batches, holdout, sources, templates, tokenised
from fedjax_llm.evaluation import ceval, classification, likelihood, mmlu
from fedjax_llm.experiments import loading, tasks
from fedjax_llm.models import classification as classifiers
from fedjax_llm.models import language

_WINDOW = 2048
_ALL = examination.Options()


def evaluate(
  run: tyro.conf.Positional[str | None] = None,
  /,
  *,
  task: Literal["perplexity", "ceval", "mmlu", "classification"] = "perplexity",
  model: str | None = None,
  adapter: str | None = None,
  text: pathlib.Path | None = None,
  data: str | None = None,
  text_column: str = "text",
  label_column: str = "label",
  exam: tyro.conf.OmitArgPrefixes[examination.Options] = _ALL,
  sequence_length: int | None = None,
  batch_size: int = 8,
  dtype: tasks.Dtype = "float32",
  as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
  """Evaluate what a run has trained, or any model with or without an adapter.

  perplexity: the text is tokenised once, with the tokenizer's special tokens,
  and scored in one pass where it fits a window, else in several. The loss is
  the mean over all predicted tokens. ceval, mmlu: multiple choice as their
  authors ask it. classification: what a classifier makes of labelled texts.

  Args:
    run: folder of a run; or folder or hub name of an adapter or a model.
    task: what to measure.
    model: Hugging Face folder or hub name of the base model; by default the
      one that the adapter names.
    adapter: PEFT folder or hub name of a LoRA adapter for it.
    text: of perplexity: a UTF-8 file.
    data: of ceval and mmlu: a folder with the authors' zip or what is in it,
      by default the hub's files; of classification: NAME_OR_FILES[@SPLIT].
    text_column: of the data to classify.
    label_column: of the data to classify.
    exam: of ceval and mmlu.
    sequence_length: tokens of a window, a prompt or a text at most; by default
      the model's context, and 2048 but for ceval.
    batch_size: rows scored at once, but for perplexity.
    dtype: what to compute in.
    as_json: print one line of JSON.
  """
  _check(task, text, data, exam)
  if run is not None:
    model, adapter = _named(run, model, adapter)
  settings = loading.Settings(jnp.dtype(dtype), sequence_length, batch_size)
  if task in ("ceval", "mmlu"):
    kind = mmlu.EXAM
    if task == "ceval":
      kind = ceval.exam(chinese_names=exam.chinese_names)
    result, shown = examination.sit(kind, exam, data, model, adapter, settings)
  else:
    if task == "perplexity":
      result = _perplexity(text, model, adapter, settings)
    else:
      columns = text_column, label_column
      result = _classification(data, columns, model, adapter, settings)
    shown = _lines(result)
  print(json.dumps({"task": task, **result}) if as_json else shown)


def _named(
  run: str, model: str | None, adapter: str | None
) -> tuple[str | None, str | None]:
  """The model and the adapter of a run, and of options beside it."""
  if adapter is not None:
    raise ValueError(f"expected RUN or --adapter, got {run} and {adapter}.")
  trained, adapter = loading.of_run(run)
  if trained and model:
    raise ValueError(f"expected one model, got {trained} and {model}.")
  return trained or model, adapter


def _check(
  task: str,
  text: pathlib.Path | None,
  data: str | None,
  exam: examination.Options,
) -> None:
  """Refuses options that the task does not read."""
  if exam != _ALL and task not in ("ceval", "mmlu"):
    raise ValueError(f"{task} is no exam, got options of one: {exam}.")
  if exam.chinese_names and task != "ceval":
    raise ValueError(f"--chinese-names is of ceval, got task {task}.")
  if (data if task == "perplexity" else text) is not None:
    expected = "--text FILE" if task == "perplexity" else "--data"
    raise ValueError(f"{task} expected {expected}, got {text=!s}, {data=!s}.")


def _lines(values: Mapping[str, Any]) -> str:
  width = max(11, *(len(name) + 1 for name in values))
  return "\n".join(f"{name:<{width}}{x:.6g}" for name, x in values.items())


def _perplexity(
  text: pathlib.Path | None,
  model: str | None,
  adapter: str | None,
  settings: loading.Settings,
) -> dict[str, float]:
  if text is None or not text.is_file():
    raise ValueError(f"--text expected a file, got {text}, which is none.")
  loaded = loading.load(model, adapter, settings.dtype)
  tokenizer = loading.tokenizer_of(loaded)
  window = settings.length(loaded.config, _WINDOW)
  rows = batches.rows_of_text(
    [text.read_text(encoding="utf-8")], tokenizer, window
  )
  tasks.check_tokens(rows.tokens, loaded.config)
  # A short text must not cost what the longest one would.
  width = int(rows.mask.any(0).sum())
  rows = batches.Examples(rows.tokens[:, : width + 1], rows.mask[:, :width])
  score_fn = language.score_fn(loaded.network(settings.dtype))
  score = likelihood.evaluator(score_fn, rows, batch_size=1)
  result = score(loaded.trained, loaded.params)
  return result | {"tokens": int(rows.mask.sum())}


def _classification(
  data: str | None,
  columns: tuple[str, str],
  model: str | None,
  adapter: str | None,
  settings: loading.Settings,
) -> dict[str, float]:
  if data is None:
    raise ValueError(
      "classification expected --data NAME_OR_FILES[@SPLIT], got none."
    )
  loaded = loading.load(model, adapter, settings.dtype)
  if loaded.head is None:
    raise ValueError(
      "classification expected the adapter of a classifier, got none."
    )
  read, (text_column, label_column) = sources.load(data), columns
  # An adapter that does not name its labels has numbers.
  names = loaded.head.names or tuple(map(str, range(loaded.head.labels)))
  labels, _ = holdout.labels_of(read, label_column, names)
  assert labels is not None
  tokenizer = tasks.load_tokenizer(loaded.folder)
  texts = [
    templates.Text("", str(x), special_tokens=False)
    for x in holdout.column_of(read, text_column)
  ]
  rows, kept = batches.labelled_rows(
    tokenised.tokenise(texts, tokenizer, end=False),
    np.arange(len(texts)),
    labels,
    settings.length(loaded.config, _WINDOW),
    special_tokens=tokenised.special_tokens(tokenizer),
  )
  tasks.check_tokens(rows.tokens, loaded.config)
  # Short texts must not cost what the longest one would.
  width = int(rows.segments.any(0).sum())
  rows = rows._replace(
    tokens=rows.tokens[:, :width], segments=rows.segments[:, :width]
  )
  score = classification.evaluator(
    classifiers.score_fn(loaded.network(settings.dtype)),
    rows,
    batch_size=settings.batch_size,
  )
  result = score(loaded.trained, loaded.params)
  return result | {"rows": len(kept), "without_text": len(texts) - len(kept)}
