"""What studies train on: tasks, each with rows to tune on and to test.

shakespeare   stories260k, a Llama of 260,032 parameters that knows children's
              stories, learns the language of 105 speakers, next-token loss
newsgroups    the shipped Llama of 1.4 M parameters, which knows Python, learns
              to tell 20 newsgroups apart by the subject and first words of a
              post, 350 clients rich in some groups
library       the shipped Llama on the modules of the standard library that its
              own training left out: little is left to learn
dolly         the same on answers to instructions, ten clients as in FedIT
"""

from typing import Any

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
ROUNDS = {"shakespeare": 40, "newsgroups": 100, "library": 20, "dolly": 20}
EVALUATIONS = {"shakespeare": 10, "newsgroups": 5, "library": 5, "dolly": 5}


def make(cell: Any, knobs: dict[str, Any]) -> tasks.Task:
  """The task of a cell."""
  rank = cell.rank
  adapter = lora.LoRA(rank, float(rank), 0.0, decoder.LINEAR)
  return TASKS[cell.task](cell, knobs, adapter)


def shakespeare(cell, knobs, adapter):
  corpus = corpora.shakespeare(shared.DATA / "tinyshakespeare" / "input.txt")
  return tasks.language_model(
    _side(records.streams(corpus, 4), cell.validation),
    model=shared.DATA / "stories260k",
    adapter=adapter,
    sequence_length=64,
    seed=cell.seed,
  )


def library(cell, knobs, adapter):
  return tasks.language_model(
    _side(records.streams(corpora.standard_library(), 8), cell.validation),
    adapter=adapter,
    sequence_length=64,
    seed=cell.seed,
  )


def newsgroups(cell, knobs, adapter):
  """Test posts are later than all others; validation posts are not."""
  posts: Any = sources.newsgroups(NEWSGROUPS, "train", subject=True)
  test: Any = sources.newsgroups(NEWSGROUPS, "test", subject=True)
  order = np.random.default_rng(0).permutation(len(posts))
  validation = posts.select(order[: len(order) // 10])
  source = records.classified(
    posts.select(order[len(order) // 10 :]),
    templates.plain("text"),
    partition.dirichlet_by_client(
      clients=350, alpha=knobs.get("dirichlet_alpha", 0.1), seed=cell.seed
    ),
    held_out=validation if cell.validation else test.shuffle(seed=0),
    held_out_rows=1000,
    seed=cell.seed,
  )
  return tasks.classifier(
    source,
    model=pretrained.SHIPPED,
    adapter=adapter,
    sequence_length=24,
    pooling="mean",
    seed=cell.seed,
  )


def dolly(cell, knobs, adapter):
  folder = shared.DATA / "dolly15k_fed10"
  source = records.instructions(
    sources.load(str(folder / "local_training_*.json")),
    templates.dolly(),
    partition.natural(),
    client_column="file",
    label_column="category",
    held_out=sources.load(str(folder / "global_test.json")),
    seed=cell.seed,
  )
  return tasks.language_model(
    _side(source, cell.validation),
    adapter=adapter,
    sequence_length=128,
    seed=cell.seed,
  )


TASKS = {
  "shakespeare": shakespeare,
  "newsgroups": newsgroups,
  "library": library,
  "dolly": dolly,
}


def schedule(cell: Any, knobs: dict[str, Any]) -> finetuning.Schedule:
  """The rounds of a cell, and what happens in each."""
  size = {"newsgroups": 16}.get(cell.task, 4)
  steps = {"newsgroups": 2}.get(cell.task, 4)
  return finetuning.Schedule(
    rounds=cell.rounds,
    clients_per_round=CLIENTS_PER_ROUND,
    batch_size=size,
    local_steps=knobs.get("local_steps", steps),
    # Private rounds are accounted for Poisson samples.
    sampling="poisson" if "cohort_factor" in knobs else "fixed",
    evaluate_every=max(1, cell.rounds // EVALUATIONS[cell.task]),
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
