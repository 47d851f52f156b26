"""FAF, the second stage of CG-FedLLM: fine-tuning through a fitted codec.

`configs/cg_fedllm.py` is composed of these.
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
