"""The codecs that the study compares, each at so many bits an entry.

Of a codec with a setting, such as a density, it is the finest whose message is
no longer than that and 2 %. Learned ones are fitted to the recorded updates.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cg_fedllm import recordings
from fedjax_llm import compression
from fedjax_llm.codecs import (
  autoencoder,
  fitting,
  layouts,
  networks,
  pca,
  row_network,
  transforms,
)
from fedjax_llm.compression import base, wire

BITS = (0.25, 0.5, 1.0, 2.0)
_DENSITIES = tuple(np.geomspace(1 / 1000, 0.9, 400))
# Of the image that the network of rows sees.
_WIDTH = 256
# Of trellises: more takes longer, and is a little closer to the bound.
_MEMORY = 8
# Longer than asked for by headers, scales and padding at most.
_SLACK = 0.02
# The paper's network has one size, and images are padded for it.
_SLACK_OF_PAPER = 0.2


def of(
  name: str, bits: float, recorded: recordings.Recorded
) -> base.Compressor | None:
  """The codec of this name; None if it has no message that short."""
  slack = _SLACK_OF_PAPER if name.startswith("paper") else _SLACK
  size = recorded.store.about["size"]
  most = (1 + slack) * bits * size / 8
  return CODECS[name](bits, recorded, most)


def nbytes(compressor: base.Compressor, size: int) -> int:
  """The length of a message."""
  vector = jax.ShapeDtypeStruct((size,), jnp.float32)
  state = jax.eval_shape(compressor.init, vector)
  payload, _ = jax.eval_shape(
    compressor.encode, vector, state, jax.random.key(0)
  )
  return wire.nbytes(payload)


def _finest(
  make: Callable[[Any], base.Compressor], settings: Sequence[Any]
) -> Callable[..., base.Compressor | None]:
  """Of settings in ascending order, the last whose message is short enough."""

  def fn(bits, recorded, most):
    del bits
    size = recorded.store.about["size"]
    low, high = -1, len(settings) - 1
    while low < high:
      middle = (low + high + 1) // 2
      if nbytes(make(settings[middle]), size) <= most:
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
  """A codec of whole numbers of bits, or such as it has."""

  def decorate(make):
    return lambda bits, recorded, most: make(bits) if bits in known else None

  return decorate


def _pca(bits, recorded, most):
  del bits
  snapshots = jnp.asarray(recorded.fitted)
  components = min(len(snapshots) - 1, int(most // 4))
  return pca.pca(pca.fit(snapshots, components))


def _rows(bits, recorded, most):
  """Ours: each row by a linear map, its latent in a bit or two."""
  of_latent = max(1, round(bits))
  latents = round(_WIDTH * bits / of_latent)
  energies = np.mean(np.square(recorded.fitted), axis=0)
  arrangement = layouts.ranked(recorded.task.trainable, energies, width=_WIDTH)
  network = row_network.network(_WIDTH, latents=latents, bits=of_latent)
  return _fitted(f"rows_{bits:g}", recorded, arrangement, network, 2e-3)


def _paper(bits, recorded, most):
  """A 64th of the entries in float32: half a bit, if there is no padding."""
  if bits != 0.5:
    return None
  arrangement = layouts.flat(recorded.task.trainable)
  return _fitted("resnet", recorded, arrangement, networks.resnet(), 2e-4)


def _fitted(name, recorded, arrangement, network, learning_rate):
  folder = recorded.folder / name
  if not (folder / "codec.json").exists():
    codec, report = fitting.fit(
      recorded.fitted,
      arrangement,
      network,
      rounds=recorded.store.rounds[: len(recorded.fitted)],
      steps=1000,
      learning_rate=learning_rate,
      normalise="columns",
    )
    print(f"{folder.parent.name} {name}\n{report.describe()}", flush=True)
    autoencoder.save(folder, codec)
  return autoencoder.autoencoder(autoencoder.load(folder))


def _transform(bits, recorded, most, unbiased=False):
  """Ours: along principal axes, bits where the variance is, by trellises."""
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
