"""What studies train on: tasks, each with rows to tune on and to test.

shakespeare   stories260k, a Llama of 260,032 parameters that knows children's
              stories, learns the language of 105 speakers, next-token loss
newsgroups    the shipped Llama of 1.4 M parameters, which knows Python, learns
              to tell 20 newsgroups apart by the subject and first words of a
              post, 350 clients rich in some groups
library       the shipped Llama on the modules of the standard library that its
              own training left out: little is left to learn
dolly         the same on answers to instructions, ten clients as in FedIT

Of real pretrained models, from the folder `FEDJAX_LLM_MODELS` or the hub:

minilm        MiniLM-L6, a sentence encoder of 22.7 M parameters, learns
              newsgroups as above, from 48 tokens of a post
smollm2       SmolLM2-135M-Instruct learns dolly
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.data import (
  corpora,
  partition,
  records,
  sources,
  templates,
)
from fedjax_llm.experiments import finetuning, tasks
from fedjax_llm.experiments import knobs as shared
from fedjax_llm.federated import rounds
from fedjax_llm.models import decoder, lora, pretrained

NEWSGROUPS = shared.DATA / "20news_bydate" / "20news-bydate.tar.gz"
CLIENTS_PER_ROUND = 10


class Problem(NamedTuple):
  """A task, and how long and on what a run of it trains.

  Attributes:
    task: (setting) -> the task.
    rounds: the number of rounds.
    evaluations: the number of evaluations in a run, without the first.
    batch_size: rows in a local step.
    local_steps: local steps in a round.
    targets: the layers that get factors.
  """

  task: Any
  rounds: int
  evaluations: int = 5
  batch_size: int = 4
  local_steps: int = 4
  targets: tuple[str, ...] = decoder.LINEAR


class Setting(NamedTuple):
  """What a task depends on.

  Attributes:
    adapter: the LoRA settings.
    seed: seed of every random draw.
    validation: whether to evaluate the rows that rates are chosen on.
    dirichlet_alpha: how unlike the clients' labels are.
  """

  adapter: lora.LoRA
  seed: int
  validation: bool
  dirichlet_alpha: float


def make(cell: Any, knobs: dict[str, Any]) -> tasks.Task:
  """The task of a cell. Its model and data may be those of another cell."""
  targets = PROBLEMS[cell.task].targets
  return _make(
    cell.task,
    Setting(
      lora.LoRA(cell.rank, float(cell.rank), 0.0, targets),
      cell.seed,
      cell.validation,
      knobs.get("dirichlet_alpha", 0.1),
    ),
  )


@functools.lru_cache(maxsize=2)
def _make(name, setting):
  return PROBLEMS[name].task(setting)


def shakespeare(setting):
  corpus = corpora.shakespeare(shared.DATA / "tinyshakespeare" / "input.txt")
  return tasks.language_model(
    _side(records.streams(corpus, 4), setting.validation),
    model=shared.DATA / "stories260k",
    adapter=setting.adapter,
    sequence_length=64,
    seed=setting.seed,
  )


def library(setting):
  return tasks.language_model(
    _side(records.streams(corpora.standard_library(), 8), setting.validation),
    adapter=setting.adapter,
    sequence_length=64,
    seed=setting.seed,
  )


def newsgroups(setting, model=pretrained.SHIPPED, sequence_length=24):
  """Test posts are later than all others; validation posts are not."""
  posts: Any = sources.newsgroups(NEWSGROUPS, "train", subject=True)
  test: Any = sources.newsgroups(NEWSGROUPS, "test", subject=True)
  order = np.random.default_rng(0).permutation(len(posts))
  validation = posts.select(order[: len(order) // 10])
  source = records.classified(
    posts.select(order[len(order) // 10 :]),
    templates.plain("text"),
    partition.dirichlet_by_client(
      clients=350, alpha=setting.dirichlet_alpha, seed=setting.seed
    ),
    held_out=validation if setting.validation else test.shuffle(seed=0),
    held_out_rows=1000,
    seed=setting.seed,
  )
  return tasks.classifier(
    source,
    model=model,
    adapter=setting.adapter,
    sequence_length=sequence_length,
    pooling="mean",
    seed=setting.seed,
  )


def minilm(setting):
  """`newsgroups` with a pretrained encoder that reads twice as much."""
  return newsgroups(setting, model=shared.MINILM, sequence_length=48)


def dolly(setting, model=pretrained.SHIPPED):
  folder = shared.DATA / "dolly15k_fed10"
  source = records.instructions(
    sources.load(str(folder / "local_training_*.json")),
    templates.dolly(),
    partition.natural(),
    client_column="file",
    label_column="category",
    held_out=sources.load(str(folder / "global_test.json")),
    seed=setting.seed,
  )
  return tasks.language_model(
    _side(source, setting.validation),
    model=model,
    adapter=setting.adapter,
    sequence_length=128,
    seed=setting.seed,
  )


def smollm2(setting):
  """`dolly` with a pretrained language model."""
  return dolly(setting, model=shared.SMOLLM2)


PROBLEMS = {
  "shakespeare": Problem(shakespeare, rounds=40, evaluations=10),
  "newsgroups": Problem(newsgroups, rounds=100, batch_size=16, local_steps=2),
  "library": Problem(library, rounds=20),
  "dolly": Problem(dolly, rounds=20),
  "minilm": Problem(
    minilm,
    rounds=60,
    evaluations=6,
    batch_size=16,
    local_steps=2,
    targets=("query", "key", "value", "dense"),
  ),
  "smollm2": Problem(smollm2, rounds=20),
}


def schedule(cell: Any, knobs: dict[str, Any]) -> finetuning.Schedule:
  """The rounds of a cell, and what happens in each."""
  problem = PROBLEMS[cell.task]
  # Rates are chosen by the end alone.
  evaluations = 1 if cell.validation else problem.evaluations
  return finetuning.Schedule(
    rounds=cell.rounds,
    clients_per_round=CLIENTS_PER_ROUND,
    batch_size=problem.batch_size,
    local_steps=knobs.get("local_steps", problem.local_steps),
    # Private rounds are accounted for Poisson samples.
    sampling="poisson" if "cohort_factor" in knobs else "fixed",
    evaluate_every=max(1, cell.rounds // evaluations),
  )


def equal_clients(
  algorithm: rounds.FederatedAlgorithm,
) -> rounds.FederatedAlgorithm:
  """The algorithm with clients of equal weight, whatever data they have."""

  def round_fn(state, frozen, examples, cohort, key):
    cohort = cohort._replace(weights=jnp.sign(cohort.weights))
    return algorithm.round(state, frozen, examples, cohort, key)

  return algorithm._replace(round=round_fn)


def _side(source: records.RowSource, validation: bool) -> records.RowSource:
  """Every other held-out row is for tuning, the rest for testing."""

  def rows(tokenizer, sequence_length):
    split = source(tokenizer, sequence_length)
    starts = np.asarray(split.held_out.starts)
    parts = [
      np.arange(first, end)[0 if validation else 1 :: 2]
      for first, end in zip(starts[:-1], starts[1:], strict=True)
    ]
    chosen = np.concatenate(parts)
    examples = jax.tree.map(lambda x: x[chosen], split.held_out.examples)
    starts = np.cumsum([0, *map(len, parts)])
    held_out = split.held_out._replace(examples=examples, starts=starts)
    return split._replace(held_out=held_out)

  return rows
