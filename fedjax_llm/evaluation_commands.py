"""What `fedjax-llm evaluate` does, once arguments are parsed."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import tqdm
import transformers
import tyro

from fedjax_llm import adapted, tasks
from fedjax_llm.data import batches, ownership, sources, templates, tokenised
from fedjax_llm.evaluation import (
  ceval,
  classification,
  exam_results,
  exams,
  likelihood,
  mmlu,
  multiple_choice,
)
from fedjax_llm.models import classification as classifiers
from fedjax_llm.models import families, language

_WINDOW = 2048


@dataclasses.dataclass(frozen=True)
class ExamOptions:
  """Options of ceval and mmlu.

  Attributes:
    split: "val" or "test"; by default val of C-Eval, test of MMLU.
    shots: solved examples before a question, fewer where there is no room.
    subjects: names of subjects; all if there are none.
    limit: the first so many questions of each subject.
    chinese_names: name C-Eval's subjects in Chinese, not by their handles.
    against: another run, adapter or model that answers too: McNemar's test.
    predictions: where to write the chosen letters, as C-Eval's site takes them.
  """

  split: exams.Split | None = None
  shots: int = 5
  subjects: tuple[str, ...] = ()
  limit: int | None = None
  chinese_names: bool = False
  against: str | None = None
  predictions: pathlib.Path | None = None


class _Settings(NamedTuple):
  """What every task computes with."""

  dtype: Any
  sequence_length: int | None
  batch_size: int

  def length(self, config: Any, most: int | None) -> int:
    """Tokens that a model is given at once, by default at most `most`."""
    context = config.max_position_embeddings
    length = self.sequence_length or min(context, most or context)
    if not 1 <= length <= context:
      raise ValueError(
        f"--sequence-length expected at least 1 and at most {context}, the"
        f" model's context, got {length}."
      )
    return length


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
  exam: tyro.conf.OmitArgPrefixes[ExamOptions] = ExamOptions(),
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
    if adapter is not None:
      raise ValueError(f"expected RUN or --adapter, got {run} and {adapter}.")
    trained, adapter = adapted.of_run(run)
    if trained and model:
      raise ValueError(f"expected one model, got {trained} and {model}.")
    model = trained or model
  settings = _Settings(jnp.dtype(dtype), sequence_length, batch_size)
  if task in ("ceval", "mmlu"):
    kind = mmlu.EXAM
    if task == "ceval":
      kind = ceval.exam(chinese_names=exam.chinese_names)
    result, shown = _exam(kind, exam, data, model, adapter, settings)
  else:
    if task == "perplexity":
      result = _perplexity(text, model, adapter, settings)
    else:
      columns = text_column, label_column
      result = _classification(data, columns, model, adapter, settings)
    shown = _lines(result)
  print(json.dumps({"task": task, **result}) if as_json else shown)


def _check(
  task: str,
  text: pathlib.Path | None,
  data: str | None,
  exam: ExamOptions,
) -> None:
  """Refuses options that the task does not read."""
  if exam != ExamOptions() and task not in ("ceval", "mmlu"):
    raise ValueError(f"{task} is no exam, got options of one: {exam}.")
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
  settings: _Settings,
) -> dict[str, float]:
  if text is None or not text.is_file():
    raise ValueError(f"--text expected a file, got {text}, which is none.")
  loaded = adapted.load(model, adapter, settings.dtype)
  tokenizer = _reader(loaded)
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


def _reader(
  loaded: adapted.Model,
) -> transformers.PreTrainedTokenizerBase:
  """The tokenizer of a language model; refuses what is none."""
  families.check_predicts(loaded.config)
  if loaded.head is not None:
    raise ValueError(
      "expected a language model, got the adapter of a classifier, whose task"
      " is classification."
    )
  return tasks.load_tokenizer(loaded.folder)


def _classification(
  data: str | None,
  columns: tuple[str, str],
  model: str | None,
  adapter: str | None,
  settings: _Settings,
) -> dict[str, float]:
  if data is None:
    raise ValueError(
      "classification expected --data NAME_OR_FILES[@SPLIT], got none."
    )
  loaded = adapted.load(model, adapter, settings.dtype)
  if loaded.head is None:
    raise ValueError(
      "classification expected the adapter of a classifier, got none."
    )
  read, (text_column, label_column) = sources.load(data), columns
  labels, _ = ownership.labels_of(read, label_column, loaded.head.names or None)
  assert labels is not None
  tokenizer = tasks.load_tokenizer(loaded.folder)
  texts = [
    templates.Text("", str(x), special_tokens=False)
    for x in ownership.column_of(read, text_column)
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


def _exam(
  exam: exams.Exam,
  options: ExamOptions,
  data: str | None,
  model: str | None,
  adapter: str | None,
  settings: _Settings,
) -> tuple[dict[str, Any], str]:
  """What an exam comes to, and a table of it."""
  split = options.split or exam.split
  papers = exams.papers(
    exam,
    data,
    split=split,
    shots=options.shots,
    subjects=options.subjects,
    limit=options.limit,
  )
  told = all(letter for paper in papers for letter in paper.answers)
  if not told and (options.predictions is None or options.against is not None):
    raise ValueError(
      f"{data or exam.hub} does not tell the answers of {split}: expected"
      " --predictions FILE and no --against, or --split val."
    )
  results = _sit(exam, papers, model, adapter, settings)
  result: dict[str, Any] = {"split": split, "shots": options.shots}
  shown = []
  if options.predictions is not None:
    letters = exam_results.predictions(results)
    options.predictions.write_text(json.dumps(letters, indent=2) + "\n")
    result["predictions"] = sum(map(len, letters.values()))
    shown.append(f"Predictions: {options.predictions}")
  if told:
    summary = exam_results.summary(exam, results)
    result |= summary
    shown.insert(0, exam_results.table(exam, summary))
  if unanswered := sum(not x for y in results for x in y.chosen):
    shown.append(f"{unanswered} questions have no room in the context.")
  if options.against is not None:
    # The first model is not kept in memory.
    other, other_adapter = adapted.of_run(options.against)
    others = _sit(exam, papers, other or model, other_adapter, settings)
    result["against"] = exam_results.comparison(exam, results, others)
    shown.append(_compared(options.against, result["against"]))
  return result, "\n\n".join(shown)


def _compared(name: str, test: Mapping[str, Any]) -> str:
  return (
    f"Against {name}, {100 * test['accuracy']:.1f}: {test['only_first']}"
    f" questions are right only here, {test['only_second']} only there;"
    f" McNemar's exact p = {test['p_value']:.3g}."
  )


def _sit(
  exam: exams.Exam,
  papers: list[multiple_choice.Paper],
  model: str | None,
  adapter: str | None,
  settings: _Settings,
) -> list[exam_results.Result]:
  """A model's answers to an exam."""
  loaded = adapted.load(model, adapter, settings.dtype)
  tokenizer = _reader(loaded)
  context = settings.length(loaded.config, exam.context)
  choices = multiple_choice.choice_tokens(
    [exam.answer(letter) for letter in exams.LETTERS], tokenizer
  )
  network, results = loaded.network(settings.dtype), []
  for paper in tqdm.tqdm(papers, desc=exam.name, unit="subject", disable=None):
    groups = multiple_choice.tokenise(paper, tokenizer, context=context)
    scores = multiple_choice.scores(
      network,
      loaded.params,
      loaded.trained,
      groups,
      choices,
      batch_size=settings.batch_size,
    )
    results.append(exam_results.result(paper, groups, scores))
  return results
