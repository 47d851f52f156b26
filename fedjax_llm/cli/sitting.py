"""Runs an exam, C-Eval or MMLU, with one model or with two to compare."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tqdm

from fedjax_llm.evaluation import exam_results, exams, multiple_choice
from fedjax_llm.experiments import loading


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of C-Eval and MMLU.

  Attributes:
    split: "val" or "test"; by default val of C-Eval and test of MMLU.
    shots: number of solved examples before a question; fewer if the context
      has no room for them.
    subjects: names of subjects; all subjects if none are given.
    limit: number of questions of each subject, from the first; None for all.
    chinese_names: whether C-Eval's subjects are named in Chinese, and not by
      their English handles.
    against: another run, adapter or model to compare with (McNemar's test).
    predictions: file for the chosen letters, in the format of C-Eval's site.
  """

  split: exams.Split | None = None
  shots: int = 5
  subjects: tuple[str, ...] = ()
  limit: int | None = None
  chinese_names: bool = False
  against: str | None = None
  predictions: pathlib.Path | None = None


def sit(
  exam: exams.Exam,
  options: Options,
  data: str | None,
  model: str | None,
  adapter: str | None,
  settings: loading.Settings,
) -> tuple[dict[str, Any], str]:
  """Runs an exam; returns its result, and a text to print.

  Raises:
    ValueError: if there are no such questions, or needed answers are unknown.
  """
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
      f"{data or exam.hub} has no answers for {split}: expected"
      " --predictions FILE and no --against, or --split val."
    )
  # Answering takes long, so other errors are raised before.
  other, other_adapter = None, None
  if options.against is not None:
    other, other_adapter = loading.of_run(options.against)
  if options.predictions and not options.predictions.parent.is_dir():
    raise ValueError(
      f"--predictions expected a file in a folder, got {options.predictions},"
      " whose folder does not exist."
    )
  results = _answer(exam, papers, model, adapter, settings)
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
    # The first model is no longer in memory.
    others = _answer(exam, papers, other or model, other_adapter, settings)
    result["against"] = exam_results.comparison(exam, results, others)
    shown.append(_compared(options.against, result["against"]))
  return result, "\n\n".join(shown)


def _compared(name: str, test: Mapping[str, Any]) -> str:
  return (
    f"Against {name}, {100 * test['accuracy']:.1f}: {test['only_first']}"
    f" questions are right only here, {test['only_second']} only there;"
    f" McNemar's exact p = {test['p_value']:.3g}."
  )


def _answer(
  exam: exams.Exam,
  papers: list[multiple_choice.Paper],
  model: str | None,
  adapter: str | None,
  settings: loading.Settings,
) -> list[exam_results.Result]:
  """Returns a model's answers to an exam."""
  loaded = loading.load(model, adapter, settings.dtype)
  tokenizer = loading.tokenizer_of(loaded)
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
