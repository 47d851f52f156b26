"""CG-FedLLM's codecs in experiments: recorded, fitted, loaded, fitted anew.

`configs/tgap.py` and `configs/cg_fedllm.py` are composed of these.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import tqdm

from fedjax_llm import experiment as experiments
from fedjax_llm import finetuning, tasks
from fedjax_llm.codecs import (
  arrangements,
  autoencoder,
  fitting,
  gaussian_prior,
  recording,
  reports,
  splits,
  transforms,
)
from fedjax_llm.data import division
from fedjax_llm.federated import codec_rounds, rounds

Source = Literal["updates", "gaussian_prior"]
Codec = transforms.Transform | autoencoder.Codec
# Of the trellises of a transform code: more takes longer, for a little less
# error.
MEMORY = 8
_RECORDED = "recorded.json"


def divided(
  task: tasks.Task, share: float, *, seed: int
) -> tuple[tasks.Task, tasks.Task]:
  """A task on D1 and the same on D2, see `data.division.divide`."""
  parts = division.divide(task.population, share, seed=seed)
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
) -> experiments.Experiment:
  """TGAP: federated rounds that record, and at the end fit a codec.

  Args:
    task: on D1, see `data.division`.
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


def fit_autoencoder(
  store: recording.Store,
  folder: pathlib.Path,
  *,
  arrangement: arrangements.Arrangement,
  **settings: Any,
) -> None:
  """TGAP's second half: fits an autoencoder and writes the folder `codec`.

  With it come `report.txt`, which is printed too, and `recorded.json`, what it
  was fitted to. A fit that was stopped goes on.

  Args:
    store: what was recorded.
    folder: of the run.
    arrangement: of the adapter.
    **settings: `network`, `steps` and the others of `codecs.fitting.fit`.
  """
  with tqdm.tqdm(total=settings["steps"], desc="codec", unit="step") as bar:

    def progress(step, loss, error):
      bar.update(step - bar.n)
      bar.set_postfix({"held-out squared error": f"{error:.3f}"})

    codec, report = fitting.fit(
      store.snapshots,
      arrangement,
      rounds=store.rounds,
      folder=folder / "fit",
      progress=progress,
      **settings,
    )
  autoencoder.save(folder / "codec", codec)
  _describe(folder / "codec", store, report)


def fit_transform(
  store: recording.Store,
  folder: pathlib.Path,
  *,
  trainable: Any,
  bits: float = 0.5,
) -> None:
  """The same with a transform code, which takes no steps but a decomposition.

  Args:
    store: what was recorded.
    folder: of the run.
    trainable: what the updates are of.
    bits: of an entry, at which `report.txt` measures the code. The transform
      itself is of any.

  Raises:
    ValueError: if there are too few updates, or so few bits do not pay for the
      headers.
  """
  known = splits.split(store.snapshots, store.rounds)
  transform = transforms.fit(store.snapshots[known.train], trainable)
  report = reports.report(
    transforms.transform_code(transform, bits, memory=MEMORY),
    store.snapshots,
    known.held_out,
    mean=known.mean,
    scale=known.scale,
  )
  transforms.save(folder / "codec", transform)
  _describe(folder / "codec", store, report)


def _describe(folder, store, report):
  """Says beside a codec what it was fitted to, and what it transmits."""
  about = json.dumps({**store.about, "snapshots": len(store)}, indent=2)
  (folder / _RECORDED).write_text(about + "\n")
  (folder / "report.txt").write_text(report.describe() + "\n")
  print(f"\n{report.describe()}\n\nCodec: {folder}")


def load_codec(
  folder: str | os.PathLike, trainable: Any
) -> tuple[Codec, dict[str, Any]]:
  """The codec that a fit wrote, of either kind, and what it was fitted to.

  With the latter is its `fingerprint`.

  Args:
    folder: `codec` in the folder of a run.
    trainable: what it is to serve.

  Raises:
    ValueError: if there is none, or it was fitted to another adapter.
  """
  folder = pathlib.Path(folder)
  path = folder / _RECORDED
  if not path.is_file():
    raise ValueError(
      f"expected a codec in {folder}, found no {_RECORDED}. `fedjax-llm run"
      " tgap` makes runs/tgap/codec."
    )
  about = json.loads(path.read_text())
  if about["layout"] != recording.layout(trainable):
    raise ValueError(
      f"the codec in {folder} was fitted to an adapter of other shapes, of"
      f" {about['size']} entries. Give the model, rank and targets that it was"
      " recorded with, or run tgap with yours."
    )
  if (folder / transforms.FILES[0]).is_file():
    codec, (_, tensors) = transforms.load(folder, trainable), transforms.FILES
  else:
    codec, (_, tensors) = autoencoder.load(folder), autoencoder.FILES
  written = (folder / tensors).read_bytes()
  about["fingerprint"] = hashlib.sha256(written).hexdigest()[:16]
  return codec, about


def coding(
  codec: Codec, *, bits: float = 0.5, is_refitted: bool = False
) -> dict[str, Any]:
  """What rounds are told of a codec of either kind.

  Args:
    codec: of `load_codec`.
    bits: of an entry on average, of a transform: the same one serves any. How
      many an autoencoder sends was chosen when it was fitted.
    is_refitted: whether it is to be fitted anew between rounds.

  Returns:
    `codec`, `compressor_of` and `setup_bytes` of `codec_rounds.with_codec`.

  Raises:
    ValueError: if a transform is to be fitted anew, or has too few bits.
  """
  if not isinstance(codec, transforms.Transform):
    return dict(
      codec=codec,
      compressor_of=autoencoder.autoencoder,
      setup_bytes=autoencoder.setup_bytes(codec),
    )
  if is_refitted:
    raise ValueError(
      "expected an autoencoder to fit anew, got a transform: its variances"
      " decide how long messages are, which rounds are compiled for. Leave it"
      " as it is, or run tgap with codec='rows'."
    )
  code = transforms.transform_code(codec, bits, memory=MEMORY)
  return dict(
    # For that reason it is no part of the state either.
    codec=(),
    compressor_of=lambda nothing: code,
    setup_bytes=transforms.setup_bytes(codec),
  )


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
  new, _ = fitting.fit(
    vectors,
    codec.arrangement,
    codec.network,
    # Two at least, to compare.
    held_out=max(0.2, 2 / len(vectors)),
    # Of the shape of the last one.
    normalise="columns" if codec.scale.size > 1 else "one",
    **settings,
  )
  return new


def refitted(
  made: experiments.Experiment,
  fit: Callable[[np.ndarray, Any], Any],
  *,
  every: int,
) -> experiments.Experiment:
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
      state = codec_rounds.refitted(state, fit(vectors, state.codec))
    return made.round(state, number)

  return dataclasses.replace(made, round=round_fn)
