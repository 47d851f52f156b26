"""CG-FedLLM's experiments: updates recorded, and a codec fitted anew.

`configs/tgap.py` and `configs/cg_fedllm.py` are composed of these, and of
`learned_codecs`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from fedjax_llm.codecs import autoencoder, fitting, gaussian_prior, recording
from fedjax_llm.data import split_rows
from fedjax_llm.experiments import finetuning, runner, tasks
from fedjax_llm.federated import codec_rounds, rounds

Source = Literal["updates", "gaussian_prior"]


def divided(
  task: tasks.Task, share: float, *, seed: int
) -> tuple[tasks.Task, tasks.Task]:
  """A task on D1 and the same on D2, see `data.split_rows.divide`."""
  parts = split_rows.divide(task.population, share, seed=seed)
  names = (f"D1, {share:g} by seed {seed}", f"D2, without {share:g} by {seed}")
  first, second = (
    dataclasses.replace(task, population=part, data={**task.data, "part": name})
    for part, name in zip(parts, names, strict=True)
  )
  return first, second


def recorded(
  task: tasks.Task,
  algorithm: rounds.FederatedAlgorithm,
  *,
  representation: codec_rounds.Representation,
  source: Source = "updates",
  about: Mapping[str, Any],
  finish: Callable[[recording.Store, pathlib.Path], None],
  **schedule: Any,
) -> runner.Experiment:
  """TGAP: federated rounds that record, and at the end fit a codec.

  Args:
    task: on D1, see `data.split_rows`.
    algorithm: of `federated.algorithms.tgap`.
    representation: what its snapshots are.
    source: "updates", or as many samples of the "gaussian_prior" that has the
      moments of each round's updates: these are then not kept.
    about: what else the store should tell, such as how D1 was divided off.
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
        folder / "recording",
        task.trainable,
        representation=representation,
        source=source,
        **about,
      )
    ]

  def observe(number, cohort, metrics):
    present = (cohort.weights > 0) & metrics["finite"]
    if not present.any():
      return
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


def refit(
  vectors: np.ndarray, codec: autoencoder.Codec, **settings: Any
) -> autoencoder.Codec:
  """The network of a codec, fitted anew to what the server has of clients.

  Args:
    vectors: [count, n]; of fewer than three the codec stays what it is. Those
      that were decoded have nothing that the codec did not already transmit.
    codec: the last one.
    **settings: `steps` and the others of `codecs.fitting.fit`.
  """
  if len(vectors) < 3:
    return codec
  normalise = "columns"
  if codec.scale.size == 1:
    normalise = "none" if codec.scale[0] == 1 else "one"
  new, _ = fitting.fit(
    vectors,
    codec.arrangement,
    codec.network,
    # Two at least, to compare.
    held_out=max(0.2, 2 / len(vectors)),
    # Like the last one.
    normalise=normalise,
    **settings,
  )
  return new


def refitted(
  made: runner.Experiment,
  fit: Callable[[np.ndarray, Any], Any],
  *,
  every: int,
) -> runner.Experiment:
  """Rounds whose codec is fitted anew to what the server has got so far.

  Args:
    made: of an algorithm of `codec_rounds.with_codec`, with `volunteers`.
    fit: (vectors [count, n], of `codec_rounds.known`; codec) -> the next one.
    every: rounds between fits.

  Raises:
    ValueError: if `every` is below 1.
  """
  if every < 1:
    raise ValueError(f"expected to refit every round or more, got {every=}.")

  def round_fn(state, number):
    if number and number % every == 0:
      vectors = codec_rounds.known(state)
      codec = fit(vectors, state.codec)
      # Nobody fetches again what is the same.
      if codec is not state.codec:
        state = codec_rounds.refitted(state, codec)
    return made.round(state, number)

  return dataclasses.replace(made, round=round_fn)
