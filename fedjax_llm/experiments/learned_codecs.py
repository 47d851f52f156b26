"""Learned codecs of runs: fitted to what was recorded, written, and read.

Of two kinds, transforms and autoencoders. `tgap` has the
experiments around them.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm

from fedjax_llm.codecs import (
  allocation,
  autoencoder,
  fitting,
  layouts,
  recording,
  reports,
  splits,
  transforms,
)

Codec = transforms.Transform | autoencoder.Codec
# Of the trellises of a transform code: more takes longer, for a little less
# error.
MEMORY = 8
_RECORDED = "recorded.json"


def fit_autoencoder(
  store: recording.Store,
  folder: pathlib.Path,
  *,
  arrangement: layouts.Arrangement,
  **settings: Any,
) -> None:
  """TGAP's second half: fits an autoencoder and writes the folder `codec`.

  With it come `report.txt`, which is printed too, and `recorded.json`, what it
  was fitted to. A fit that was stopped goes on, if no more was recorded since.

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
      folder=folder / "fit" / str(len(store)),
      progress=progress,
      **settings,
    )
  autoencoder.save(folder / "codec", codec)
  _describe(folder / "codec", store, report)


def check_bits(trainable: Any, bits: float) -> None:
  """Raises a `ValueError` if so few bits an entry make no transform code."""
  size = sum(x.size for x in jax.tree.leaves(trainable))
  allocation.allocated(np.ones(size), bits, memory=MEMORY)


def fit_transform(
  store: recording.Store,
  folder: pathlib.Path,
  *,
  trainable: Any,
  bits: float = 0.5,
) -> None:
  """The same with a transform code, which takes no steps but a decomposition.

  The report is of the code of the least error. That of an unbiased one is
  larger by what it is longer, and tells nothing of a mean of many.

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
  about = {**store.about, "snapshots": len(store), "warning": report.warning}
  (folder / _RECORDED).write_text(json.dumps(about, indent=2) + "\n")
  (folder / "report.txt").write_text(report.describe() + "\n")
  print(f"\n{report.describe()}\n\nCodec: {folder}")


def load(
  folder: str | os.PathLike, trainable: Any
) -> tuple[Codec, dict[str, Any]]:
  """The codec that a fit wrote, of either kind, and what it was fitted to.

  With the latter is its `fingerprint`. If it did not pass its report, that is
  told again.

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
  if about.get("warning"):
    tqdm.tqdm.write(f"warning: {folder}: {about['warning']}")
  if (folder / transforms.FILES[0]).is_file():
    codec, (_, tensors) = transforms.load(folder, trainable), transforms.FILES
  else:
    codec, (_, tensors) = autoencoder.load(folder), autoencoder.FILES
  written = (folder / tensors).read_bytes()
  about["fingerprint"] = hashlib.sha256(written).hexdigest()[:16]
  return codec, about


def coding(
  codec: Codec,
  *,
  bits: float = 0.5,
  unbiased: bool = True,
  is_refitted: bool = False,
) -> dict[str, Any]:
  """What rounds are told of a codec of either kind.

  Args:
    codec: of `load`.
    bits: of an entry on average, of a transform: the same one serves any. How
      many an autoencoder sends was chosen when it was fitted.
    unbiased: of a transform, for means over many clients; otherwise the error
      of each message is least, as error feedback needs.
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
      " as it is, or `fedjax-llm run tgap --codec rows`."
    )
  code = transforms.transform_code(
    codec, bits, memory=MEMORY, unbiased=unbiased
  )
  return dict(
    # Nothing in the state, where variances would be traced.
    codec=(),
    compressor_of=lambda nothing: code,
    setup_bytes=transforms.setup_bytes(codec),
  )
