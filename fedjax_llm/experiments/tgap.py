"""The experiments of CG-FedLLM: record updates, fit a codec, fit it anew.

`configs/tgap.py` and `configs/cg_fedllm.py` are composed of these.
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
from fedjax_llm.federated import codec_state, rounds
from fedjax_llm.federated import network as links
from fedjax_llm.federated.algorithms import cg_fed_llm

Source = Literal["updates", "gaussian_prior"]
# Memory of the trellises of a transform code: more is slower, for a little less
# error.
MEMORY = 8


def divided(
  task: tasks.Task, share: float, *, seed: int
) -> tuple[tasks.Task, tasks.Task]:
  """The task on D1 and the task on D2, see `data.split_rows.divide`."""
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
  finish: Callable[[recording.Store, pathlib.Path], None],
) -> runner.Experiment:
  """TGAP: federated rounds that record updates, and at the end fit a codec.

  Args:
    task: task on D1, see `divided`.
    algorithm: algorithm from `federated.algorithms.tgap`.
    schedule: the rounds and what happens in each.
    network: the clients' links, see `finetuning.fine_tuning`.
    representation: what its snapshots are.
    source: what is recorded: the "updates", or as many samples of the
      "gaussian_prior", which has their moments. The updates are then not kept.
    about: what else to say in the store, such as how D1 was split off.
    finish: called at the end with the store and the folder of the run, to fit
      and write a codec.

  Returns:
    The experiment of `finetuning.fine_tuning`, which also writes the store into
    the folder `recording`.

  Raises:
    ValueError: if `source` is another word, or from `finetuning.fine_tuning`.
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
  store: recording.Store,
  folder: pathlib.Path,
  *,
  layout: layouts.Layout,
  network: networks.Network,
  settings: fitting.Settings,
) -> None:
  """Fits an autoencoder, and writes it and `report.txt` into `codec`.

  The report is printed too. A fit that was stopped continues, unless more was
  recorded in the meantime.

  Args:
    store: recorded updates.
    folder: folder of the run.
    layout: layout of the adapter.
    network: networks to fit.
    settings: how to fit.
  """
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


def check_bits(trainable: Any, bits: float) -> None:
  """Raises a `ValueError` if a transform code needs more bits per entry."""
  size = sum(x.size for x in jax.tree.leaves(trainable))
  allocation.allocated(np.ones(size), bits, memory=MEMORY)


def fit_transform(
  store: recording.Store,
  folder: pathlib.Path,
  *,
  trainable: Any,
  bits: float = 0.5,
) -> None:
  """Fits a transform, and writes it and `report.txt` into `codec`.

  The report is about the code of least error. The error of an unbiased code is
  larger, and does not say how good the mean of many messages is.

  Args:
    store: recorded updates.
    folder: folder of the run.
    trainable: tree that the updates are of.
    bits: bits per entry of the code that is reported. The transform itself
      serves any number of bits.

  Raises:
    ValueError: if there are too few updates, or `bits` is too small for the
      headers.
  """
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


def _write(folder, codec, store, report):
  """Writes a codec, what it was fitted to, and what it transmits."""
  about = {**store.about, "snapshots": len(store), "warning": report.warning}
  files.save(folder, codec, about)
  (folder / "report.txt").write_text(report.describe() + "\n")
  print(f"\n{report.describe()}\n\nCodec: {folder}")


def coding(
  codec: files.Codec,
  *,
  bits: float = 0.5,
  unbiased: bool = True,
  is_refitted: bool = False,
) -> codec_state.Coding:
  """How rounds send uploads by a codec of either kind.

  Args:
    codec: codec from `files.load`.
    bits: mean bits per entry, for a transform. The bits of an autoencoder were
      chosen when it was fitted.
    unbiased: whether a transform is coded for means over many clients;
      otherwise each message has the least error, as error feedback needs.
    is_refitted: whether the codec will be fitted anew between rounds.

  Raises:
    ValueError: if a transform is to be fitted anew, or has too few bits.
  """
  if not isinstance(codec, transforms.Transform):
    return codec_state.Coding(
      codec,
      autoencoder.autoencoder,
      autoencoder.setup_bytes(codec),
      codec.layout.signature,
    )
  if is_refitted:
    raise ValueError(
      "expected an autoencoder to fit anew, got a transform. Its variances"
      " decide the message length, which rounds are compiled for. Leave it as"
      " it is, or `fedjax-llm run tgap --codec rows`."
    )
  code = transforms.transform_code(
    codec, bits, memory=MEMORY, unbiased=unbiased
  )
  return codec_state.Coding(
    # Not in the state, where its variances would be traced.
    codec=(),
    compressor_of=lambda nothing: code,
    setup_bytes=transforms.setup_bytes(codec),
    signature=codec.signature,
  )


def refit(
  vectors: np.ndarray, codec: autoencoder.Codec, settings: fitting.Settings
) -> autoencoder.Codec:
  """Fits the network of a codec anew to what the server knows of clients.

  Decoded vectors contain nothing that the codec did not already transmit.

  Args:
    vectors: vectors [count, n]; with fewer than three the codec stays as it is.
    codec: current codec, whose kind of normalisation is kept.
    settings: how to fit; two vectors or more are held out.
  """
  if len(vectors) < 3:
    return codec
  normalise = "columns"
  if codec.scale.size == 1:
    normalise = "none" if codec.scale[0] == 1 else "one"
  held_out = max(settings.held_out, 2 / len(vectors))
  settings = dataclasses.replace(
    settings, normalise=normalise, held_out=held_out
  )
  new, _ = fitting.fit(vectors, codec.layout, codec.network, settings)
  return new


def refitted(
  made: runner.Experiment,
  fit: Callable[[np.ndarray, Any], Any],
  *,
  every: int,
) -> runner.Experiment:
  """Rounds whose codec is fitted anew to what the server has so far.

  Args:
    made: experiment with an algorithm of `codec_state.with_codec` that has
      `volunteers`.
    fit: function from (vectors [count, n] of `codec_state.known`, codec) to the
      next codec.
    every: rounds between fits.

  Raises:
    ValueError: if `every` is below 1.
  """
  if every < 1:
    raise ValueError(f"refitted expected every >= 1 rounds, got {every=}.")

  def round_fn(state, number):
    if number and number % every == 0:
      vectors = codec_state.known(state)
      codec = fit(vectors, state.codec)
      # Clients do not fetch the same codec again.
      if codec is not state.codec:
        state = codec_state.refitted(state, codec)
    return made.round(state, number)

  return dataclasses.replace(made, round=round_fn)
