"""`fedjax-llm evaluate`: perplexity and classification; exams by `sitting`."""

import json
import pathlib
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from fedjax_llm.cli import sitting
from fedjax_llm.data import batches, holdout, sources, templates, tokenised
from fedjax_llm.evaluation import ceval, classification, likelihood, mmlu
from fedjax_llm.experiments import loading, tasks
from fedjax_llm.models import classification as classifiers
from fedjax_llm.models import language

_WINDOW = 2048
_WHOLE_EXAM = sitting.Options()


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
  exam: tyro.conf.OmitArgPrefixes[sitting.Options] = _WHOLE_EXAM,
  sequence_length: int | None = None,
  batch_size: int = 8,
  dtype: tasks.Dtype = "float32",
  as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
  """Evaluate a run, or any model with or without an adapter.

  perplexity: the text is tokenised once, with the tokenizer's special tokens,
  and cut into windows. The loss is the mean over all predicted tokens. ceval,
  mmlu: multiple choice, with the prompts of the exam's authors. classification:
  loss, accuracy and F1 on labelled texts.

  Args:
    run: folder of a run; or folder or hub name of an adapter or a model.
    task: what to measure.
    model: Hugging Face folder or hub name of the base model; by default the
      one that the adapter names.
    adapter: PEFT folder or hub name of a LoRA adapter for it.
    text: UTF-8 file for perplexity.
    data: for ceval and mmlu, a folder with the authors' zip or its contents, by
      default the files on the hub; for classification, NAME_OR_FILES[@SPLIT].
    text_column: column of the texts to classify.
    label_column: column of the labels of these texts.
    exam: options of ceval and mmlu.
    sequence_length: largest number of tokens in a window, a prompt or a text.
      By default it is the model's context, but 2048 at most except for ceval.
    batch_size: rows scored at once; perplexity scores one window at a time.
    dtype: dtype of the model and its activations.
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
    result, shown = sitting.sit(kind, exam, data, model, adapter, settings)
  else:
    if task == "perplexity":
      result = _perplexity(text, model, adapter, settings)
    else:
      columns = text_column, label_column
      result = _classification(data, columns, model, adapter, settings)
    width = max(11, *(len(name) + 1 for name in result))
    shown = "\n".join(f"{name:<{width}}{x:.6g}" for name, x in result.items())
  print(json.dumps({"task": task, **result}) if as_json else shown)


def _named(
  run: str, model: str | None, adapter: str | None
) -> tuple[str | None, str | None]:
  """Returns the model and the adapter that the run and the options name."""
  if adapter is not None:
    raise ValueError(
      f"evaluate expected RUN or --adapter, got both: {run} and {adapter}."
    )
  trained, adapter = loading.of_run(run)
  if trained and model:
    raise ValueError(
      f"evaluate expected one model, got {trained} and {model}. Leave out"
      " --model: the run has trained a whole model."
    )
  return trained or model, adapter


def _check(
  task: str,
  text: pathlib.Path | None,
  data: str | None,
  exam: sitting.Options,
) -> None:
  """Raises an error for options that the task does not use."""
  if exam != _WHOLE_EXAM and task not in ("ceval", "mmlu"):
    raise ValueError(
      f"task {task} expected no options of an exam, got {exam}. Add --task"
      " ceval or --task mmlu."
    )
  if exam.chinese_names and task != "ceval":
    raise ValueError(
      f"--chinese-names expected task ceval, got task {task}. Leave it out."
    )
  if (data if task == "perplexity" else text) is not None:
    expected = "--text FILE" if task == "perplexity" else "--data"
    raise ValueError(f"{task} expected {expected}, got {text=!s}, {data=!s}.")


def _perplexity(
  text: pathlib.Path | None,
  model: str | None,
  adapter: str | None,
  settings: loading.Settings,
) -> dict[str, float]:
  if text is None or not text.is_file():
    raise ValueError(
      f"perplexity expected a file, --text FILE; got {text}, which is not one."
    )
  loaded = loading.load(model, adapter, settings.dtype)
  tokenizer = loading.tokenizer_of(loaded)
  window = settings.length(loaded.config, _WINDOW)
  rows = batches.rows_of_text(
    [text.read_text(encoding="utf-8")], tokenizer, window
  )
  loading.check_tokens(rows.tokens, loaded.config)
  # A short text needs no full windows: columns without predictions are cut.
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
  # Labels are numbers if the adapter has no names for them.
  names = loaded.head.names or tuple(map(str, range(loaded.head.labels)))
  labels, _ = holdout.labels_of(read, label_column, names)
  assert labels is not None
  tokenizer = loading.load_tokenizer(loaded.folder)
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
  loading.check_tokens(rows.tokens, loaded.config)
  # Short texts need no full rows: columns of padding are cut.
  width = int(rows.segments.any(0).sum())
  rows = rows._replace(
    tokens=rows.tokens[:, :width], segments=rows.segments[:, :width]
  )
  score_fn = classifiers.score_fn(loaded.network(settings.dtype))
  score = classification.evaluator(
    score_fn, rows, batch_size=settings.batch_size
  )
  result = score(loaded.trained, loaded.params)
  return result | {"rows": len(kept), "without_text": len(texts) - len(kept)}
