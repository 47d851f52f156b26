"""TGAP, the first stage of CG-FedLLM: record updates, and fit a codec to them.

`configs/tgap.py` uses these functions.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import tqdm

from fedjax_llm.codecs import (
  allocation,
  autoencoder,
  distortion,
  files,
  fitting,
  gaussian_prior,
  layouts,
  networks,
  recording,
  splits,
  transforms,
)
from fedjax_llm.data import split_rows
from fedjax_llm.experiments import checkpoints, finetuning, runner, tasks
from fedjax_llm.federated import network as links
from fedjax_llm.federated import rounds
from fedjax_llm.federated.algorithms import cg_fed_llm

Source = Literal["updates", "gaussian_prior"]
# Called with the recorded updates and the folder of the run.
Finish = Callable[[recording.Store, pathlib.Path], None]
# Memory of the trellises of a transform code. More is slower, with a little
# less error.
MEMORY = 8


def divided(
  task: tasks.Task, share: float, *, seed: int
) -> tuple[tasks.Task, tasks.Task]:
  """Returns the task on D1 and that on D2, see `data.split_rows.divide`."""
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
  schedule: finetuning.Schedule,
  *,
  network: links.Network | None = None,
  representation: cg_fed_llm.Representation,
  source: Source = "updates",
  about: Mapping[str, Any],
  finish: Finish,
) -> runner.Experiment:
  """Makes TGAP: federated rounds that record updates, then fit a codec.

  Args:
    task: task on D1, see `divided`.
    algorithm: algorithm from `federated.algorithms.tgap`.
    schedule: the rounds and what happens in each.
    network: the clients' links, see `finetuning.fine_tuning`.
    representation: what `algorithm` records, see `cg_fed_llm.Representation`.
    source: what is stored: the "updates"; or "gaussian_prior", as many samples
      of a Gaussian with the updates' moments, and no update.
    about: further entries of the store's record, such as how D1 was split off.
    finish: called with the store and the run folder after the last round, to
      fit and write a codec.

  Returns:
    The experiment of `finetuning.fine_tuning`, which also writes the store into
    the folder `recording`.

  Raises:
    ValueError: if `source` is unknown, and as in `finetuning.fine_tuning`.
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

  made = finetuning.fine_tuning(
    task, algorithm, schedule, network=network, observe=observe
  )

  def export(state, folder):
    made.export(state, folder)
    finish(stores[0], folder)

  return dataclasses.replace(made, prepare=prepare, export=export)


def fit_autoencoder(
  layout: layouts.Layout, network: networks.Network, settings: fitting.Settings
) -> Finish:
  """Makes a `finish` of `recorded` that fits an autoencoder.

  It writes the codec and its report into the folder `codec` of the run. A fit
  that was stopped continues, unless more was recorded in the meantime.

  Args:
    layout: layout of the adapter.
    network: networks to fit.
    settings: how to fit.

  Raises:
    ValueError: if latents cannot be sent in the network's `bits`.
  """
  # Raises an error now, and not after everything is recorded.
  autoencoder.latent_quantiser(network)

  def finish(store, folder):
    kept = folder / "fit" / str(len(store))
    with (
      checkpoints.Checkpoints(kept) as keeper,
      tqdm.tqdm(total=settings.steps, desc="codec", unit="step") as bar,
    ):

      def progress(step, loss, error):
        bar.update(step - bar.n)
        bar.set_postfix({"held-out squared error": f"{error:.3f}"})

      codec, report = fitting.fit(
        store.snapshots,
        layout,
        network,
        settings,
        rounds=store.rounds,
        checkpoints=keeper,
        progress=progress,
      )
    _write(folder / "codec", codec, store, report)

  return finish


def fit_transform(trainable: Any, bits: float = 0.5) -> Finish:
  """Makes a `finish` of `recorded` that fits a transform.

  It writes the codec and its report into the folder `codec` of the run. The
  report is about the code of least error at `bits`; the transform itself serves
  any number of bits.

  Args:
    trainable: tree of the trained arrays, or of their shapes.
    bits: bits per vector entry.

  Raises:
    ValueError: if `bits` is too small for the headers.
  """
  size = sum(x.size for x in jax.tree.leaves(trainable))
  # Raises an error now, and not after everything is recorded.
  allocation.allocated(np.ones(size), bits, memory=MEMORY)

  def finish(store, folder):
    known = splits.split(store.snapshots, store.rounds)
    transform = transforms.fit(store.snapshots[known.train], trainable)
    report = distortion.report(
      transforms.transform_code(transform, bits, memory=MEMORY),
      store.snapshots,
      known.held_out,
      mean=known.mean,
      scale=known.scale,
    )
    _write(folder / "codec", transform, store, report)

  return finish


def _write(folder, codec, store, report):
  """Writes a codec and its report, and prints the report."""
  about = {**store.about, "snapshots": len(store), "warning": report.warning}
  files.save(folder, codec, about)
  (folder / "report.txt").write_text(report.describe() + "\n")
  print(f"\n{report.describe()}\n\nCodec: {folder}")
