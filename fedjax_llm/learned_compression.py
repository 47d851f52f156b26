"""Codecs in experiments: updates are recorded, and codecs are fitted anew.

made = learned_compression.recorded(task, tgap.federated_pretraining(...), ...)
made = learned_compression.refitted(made, refit, every=5)
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from fedjax_llm import experiment as experiments
from fedjax_llm import finetuning, tasks
from fedjax_llm.codecs import gaussian_prior, recording
from fedjax_llm.federated import codec_rounds, rounds

Source = Literal["updates", "gaussian_prior"]
FOLDER = "recording"


def recorded(
  task: tasks.Task,
  algorithm: rounds.FederatedAlgorithm,
  *,
  representation: codec_rounds.Representation,
  source: Source = "updates",
  finish: Callable[[recording.Store, pathlib.Path], None],
  **schedule: Any,
) -> experiments.Experiment:
  """TGAP: federated rounds that record, and at the end fit a codec.

  Args:
    task: on D1, see `data.division`.
    algorithm: of `federated.algorithms.tgap`.
    representation: what its snapshots are.
    source: "updates", or as many samples of the "gaussian_prior" that has the
      moments of each round's updates: these are then not kept.
    finish: (what was recorded, folder of the run) -> None; fits and writes.
    **schedule: `rounds`, `clients_per_round` and the others of
      `finetuning.federated`.

  Returns:
    An experiment that writes the store into `recording`, beside what
    `finetuning.federated` writes.

  Raises:
    ValueError: if `source` is neither, or as `finetuning.federated`.
  """
  if source not in ("updates", "gaussian_prior"):
    raise ValueError(
      f"expected source 'updates' or 'gaussian_prior', got {source!r}."
    )
  blocks = gaussian_prior.blocks(task.trainable)
  stores: list[recording.Store] = []

  def prepare(folder):
    stores[:] = [
      recording.Store.create(
        folder / FOLDER,
        task.trainable,
        representation=representation,
        source=source,
      )
    ]

  def observe(number, cohort, metrics):
    present = (cohort.weights > 0) & metrics["finite"]
    vectors = metrics["snapshots"][present]
    if source == "gaussian_prior":
      told = gaussian_prior.moments(vectors, blocks)
      count = len(vectors)
      vectors = gaussian_prior.draw(
        told, blocks, count, seed=task.seed, round_number=number
      )
    stores[0].append(
      number,
      clients=cohort.clients[present],
      weights=cohort.weights[present],
      vectors=vectors,
    )

  made = finetuning.federated(task, algorithm, observe=observe, **schedule)

  def export(state, folder):
    made.export(state, folder)
    finish(stores[0], folder)

  return dataclasses.replace(made, prepare=prepare, export=export)


def refitted(
  made: experiments.Experiment,
  refit: Callable[[np.ndarray, Any], Any],
  *,
  every: int,
) -> experiments.Experiment:
  """Rounds whose codec is fitted anew to what the server has got so far.

  Args:
    made: of an algorithm of `codec_rounds.with_codec`, with `volunteers`.
    refit: (vectors [count, n], of `codec_rounds.known`; codec) -> the next.
    every: rounds between fits.

  Raises:
    ValueError: if `every` is below 1.
  """
  if every < 1:
    raise ValueError(f"expected to refit every round or more, got {every=}.")

  def round_fn(state, number):
    if number and number % every == 0:
      vectors = codec_rounds.known(state)
      state = codec_rounds.refitted(state, refit(vectors, state.codec))
    return made.round(state, number)

  return dataclasses.replace(made, round=round_fn)
