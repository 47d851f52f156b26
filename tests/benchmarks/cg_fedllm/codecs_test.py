"""The codecs of the study have messages as long as it says."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.cg_fedllm import codecs
from fedjax_llm.codecs import distortion

SIZE = 2 * 2 * 128 * 192
TREE = {"a": np.zeros((2, 192, 128)), "b": np.zeros((2, 128, 192))}
# A little longer than asked for, whatever their header and scales.
FIXED = ("EDEN", "DRIVE", "trellis")
# Fitted for long.
NETWORKS = ("our autoencoder", "paper's autoencoder")


@pytest.fixture(scope="module")
def recorded():
  """What `codecs.of` reads of a recording."""
  generator = np.random.default_rng(0)
  vectors = generator.standard_normal((12, SIZE)).astype(np.float32)
  return types.SimpleNamespace(
    store=types.SimpleNamespace(about={"size": SIZE}),
    fitted=vectors,
    task=types.SimpleNamespace(
      trainable={name: jnp.asarray(x) for name, x in TREE.items()}
    ),
  )


@pytest.mark.parametrize("bits", codecs.BITS)
@pytest.mark.parametrize("name", sorted(set(codecs.CODECS) - set(NETWORKS)))
def test_messages_are_as_long_as_the_study_says(name, bits, recorded):
  codec = codecs.of(name, bits, recorded)
  if codec is None:
    # Of one length, or a step of a norm's too long.
    assert name in ("DRIVE", "QSGD")
    assert bits != {"DRIVE": 1.0, "QSGD": 2.0}[name]
    return
  told = 8 * distortion.nbytes(codec, SIZE) / SIZE
  assert told <= bits * (1.1 if name in FIXED else 1.02)
  # PCA has no more numbers than there were snapshots, PowerSGD whole ranks.
  assert told > 0.6 * bits or name in ("PCA", "PowerSGD")
