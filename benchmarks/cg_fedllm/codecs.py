"""The codecs that the study compares, each at a given number of bits per entry.

A codec with a setting, such as a density, takes the finest setting whose
message is at most 2 % longer. Learned codecs are fitted to recorded updates.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.cg_fedllm import recordings
from fedjax_llm import compression
from fedjax_llm.codecs import (
  autoencoder,
  distortion,
  files,
  fitting,
  layouts,
  networks,
  pca,
  row_network,
  transforms,
)
from fedjax_llm.compression import base

BITS = (0.25, 0.5, 1.0, 2.0)
_DENSITIES = tuple(np.geomspace(1 / 1000, 0.9, 400))
# Width of the image that the network of rows sees.
_WIDTH = 256
# Memory of trellises: more is slower, and a little closer to the bound.
_MEMORY = 8
# How much longer than asked for a message may be, for headers and scales.
_SLACK = 0.02
# The paper's network has one size, for which images are padded.
_SLACK_OF_PAPER = 0.2


def of(
  name: str, bits: float, recorded: recordings.Recorded
) -> base.Compressor | None:
  """Returns the codec of this name; None if its messages are all longer."""
  slack = _SLACK_OF_PAPER if name.startswith("paper") else _SLACK
  size = recorded.store.about["size"]
  most = (1 + slack) * bits * size / 8
  return CODECS[name](bits, recorded, most)


def _finest(
  make: Callable[[Any], base.Compressor], settings: Sequence[Any]
) -> Callable[..., base.Compressor | None]:
  """The last setting, in ascending order, whose message is short enough."""

  def fn(bits, recorded, most):
    del bits
    size = recorded.store.about["size"]
    low, high = -1, len(settings) - 1
    while low < high:
      middle = (low + high + 1) // 2
      if distortion.nbytes(make(settings[middle]), size) <= most:
        low = middle
      else:
        high = middle - 1
    return None if low < 0 else make(settings[low])

  return fn


def _top_k(density):
  return compression.chain(
    compression.top_k(density), compression.cast(jnp.float16)
  )


def _at(*known: float) -> Callable[..., Any]:
  """A codec that exists at the known numbers of bits only."""

  def decorate(make):
    return lambda bits, recorded, most: make(bits) if bits in known else None

  return decorate


def _pca(bits, recorded, most):
  del bits
  snapshots = jnp.asarray(recorded.fitted)
  components = min(len(snapshots) - 1, int(most // 4))
  return pca.pca(pca.fit(snapshots, components))


def _rows(bits, recorded, most):
  """Ours: a linear map of each row, with a latent of one or two bits."""
  of_latent = max(1, round(bits))
  latents = round(_WIDTH * bits / of_latent)
  energies = np.mean(np.square(recorded.fitted), axis=0)
  layout = layouts.ranked(recorded.task.trainable, energies, width=_WIDTH)
  network = row_network.network(_WIDTH, latents=latents, bits=of_latent)
  return _fitted(f"rows_{bits:g}", recorded, layout, network, 2e-3)


def _paper(bits, recorded, most):
  """1/64 of the entries in float32: half a bit, if there is no padding."""
  if bits != 0.5:
    return None
  layout = layouts.flat(recorded.task.trainable)
  return _fitted("resnet", recorded, layout, networks.resnet(), 2e-4)


def _fitted(name, recorded, layout, network, learning_rate):
  folder = recorded.folder / name
  if not (folder / "codec.json").exists():
    codec, report = fitting.fit(
      recorded.fitted,
      layout,
      network,
      fitting.Settings(steps=1000, learning_rate=learning_rate),
      rounds=recorded.store.rounds[: len(recorded.fitted)],
    )
    print(f"{folder.parent.name} {name}\n{report.describe()}", flush=True)
    files.save(folder, codec, recorded.store.about)
  codec: Any = files.load(folder, recorded.task.trainable)[0]
  return autoencoder.autoencoder(codec)


def _transform(bits, recorded, most, unbiased=False):
  """Ours: principal axes, with more bits where the variance is larger."""
  del bits
  size = recorded.store.about["size"]
  transform = transforms.fit(recorded.fitted, recorded.task.trainable)
  return transforms.transform_code(
    transform, 8 * most / size, memory=_MEMORY, unbiased=unbiased
  )


CODECS: dict[str, Callable[..., base.Compressor | None]] = {
  "Top-K": _finest(_top_k, _DENSITIES),
  "STC": _finest(compression.stc, _DENSITIES),
  "QSGD": _finest(compression.qsgd, range(1, 8)),
  "PowerSGD": _finest(compression.power_sgd, range(1, 65)),
  "DRIVE": _at(1.0)(lambda bits: compression.drive()),
  "EDEN": _at(*BITS)(lambda bits: compression.eden(bits, unbiased=False)),
  "trellis": _at(*BITS)(
    lambda bits: compression.chain(
      compression.rotate(), compression.trellis(bits, memory=_MEMORY)
    )
  ),
  "PCA": _pca,
  "paper's autoencoder": _paper,
  "our autoencoder": _rows,
  "our transform code": _transform,
  "our transform code, unbiased": functools.partial(_transform, unbiased=True),
}
