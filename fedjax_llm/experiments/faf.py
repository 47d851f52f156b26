"""FAF, the second stage of CG-FedLLM: fine-tuning through a fitted codec.

`configs/cg_fedllm.py` uses these functions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_llm.codecs import autoencoder, files, fitting, transforms
from fedjax_llm.experiments import runner, tgap
from fedjax_llm.federated import codec_state


def coding(
  codec: files.Codec,
  *,
  bits: float = 0.5,
  unbiased: bool = True,
  is_refitted: bool = False,
) -> codec_state.Coding:
  """Makes the coding of uploads by an autoencoder or a transform.

  Args:
    codec: codec from `files.load`.
    bits: mean bits per entry, for a transform. The bits of an autoencoder were
      chosen when it was fitted.
    unbiased: whether messages of a transform are unbiased, for means over many
      clients. Otherwise each has the least error, as error feedback needs.
    is_refitted: whether the codec will be refitted between rounds.

  Raises:
    ValueError: if a transform is to be refitted, or `bits` is too small for it.
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
      "expected an autoencoder to refit, got a transform. Its variances set the"
      " message length, which is fixed in compiled rounds. Do not refit it, or"
      " fit an autoencoder: `fedjax-llm run tgap --codec rows`."
    )
  code = transforms.transform_code(
    codec, bits, memory=tgap.MEMORY, unbiased=unbiased
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
  """Refits the network of a codec to the clients' last vectors.

  Decoded vectors contain nothing that the codec did not already transmit. Only
  those of volunteers, sent without the codec, do.

  Args:
    vectors: vectors [count, n]. With fewer than three, the codec is unchanged.
    codec: current codec, whose kind of normalisation is kept.
    settings: how to fit. At least two vectors are held out.
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
  """Makes an experiment that refits its codec between rounds.

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
      # Clients need not download an unchanged codec again.
      if codec is not state.codec:
        state = codec_state.refitted(state, codec)
    return made.round(state, number)

  return dataclasses.replace(made, round=round_fn)
