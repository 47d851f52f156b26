"""MMLU (Hendrycks et al., 2021): 57 subjects in English.

Prompts and averages follow `evaluate.py` in github.com/hendrycks/test at
4450500: five shots, the letter after a space, at most 2,048 tokens in a prompt,
and the same weight for every question. The split is "test".
"""

from collections.abc import Mapping
from typing import Any

from fedjax_llm.evaluation import exams

# The subjects of each category.
_SUBJECTS = {
  "STEM": """
    abstract_algebra astronomy college_biology college_chemistry
    college_computer_science college_mathematics college_physics
    computer_security conceptual_physics electrical_engineering
    elementary_mathematics high_school_biology high_school_chemistry
    high_school_computer_science high_school_mathematics high_school_physics
    high_school_statistics machine_learning
  """,
  "humanities": """
    formal_logic high_school_european_history high_school_us_history
    high_school_world_history international_law jurisprudence logical_fallacies
    moral_disputes moral_scenarios philosophy prehistory professional_law
    world_religions
  """,
  "social sciences": """
    econometrics high_school_geography high_school_government_and_politics
    high_school_macroeconomics high_school_microeconomics high_school_psychology
    human_sexuality professional_psychology public_relations security_studies
    sociology us_foreign_policy
  """,
  "other": """
    anatomy business_ethics clinical_knowledge college_medicine global_facts
    human_aging management marketing medical_genetics miscellaneous nutrition
    professional_accounting professional_medicine virology
  """,
}
GROUPS = {name: tuple(text.split()) for name, text in _SUBJECTS.items()}


def _read(number: int, row: Mapping[str, Any]) -> exams.Question:
  """Reads a line of the authors' files, or a row of the hub's data set."""
  if "choices" in row:
    options, answer = row["choices"], exams.LETTERS[row["answer"]]
  else:
    options, answer = [row[x] for x in exams.LETTERS], row["answer"]
  return exams.Question(row["question"], tuple(options), answer, str(number))


def _header(subject: str) -> str:
  # The authors' `format_subject` writes two spaces after "about".
  return (
    "The following are multiple choice questions (with answers) about "
    f" {subject.replace('_', ' ')}.\n\n"
  )


EXAM = exams.Exam(
  name="mmlu",
  hub="cais/mmlu",
  groups=GROUPS,
  split="test",
  context=2048,
  averaged_over="questions",
  columns=("question", *exams.LETTERS, "answer"),
  hub_splits={"val": "validation"},
  read=_read,
  header=_header,
  ask=lambda question: f"{exams.lettered(question)}\nAnswer:",
  answer=lambda letter: f" {letter}",
)
