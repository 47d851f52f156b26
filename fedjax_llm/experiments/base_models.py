"""The model of a task: what is trained, what is frozen, how it is saved."""

import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from fedjax_llm.federated import clients, draws
from fedjax_llm.models import adapters, families, heads, lora, pretrained
from fedjax_llm.models import quantized as quantization

Dtype = Literal["float32", "bfloat16"]
Quantize = quantization.Format


class Loaded(NamedTuple):
  """A base model with its trained and frozen parameters.

  Attributes:
    network: the Flax module.
    trainable: the parameters that are trained.
    frozen: the parameters that are not trained; empty in full fine-tuning.
    adapter: the LoRA settings; None in full fine-tuning.
    save: (trainable, folder, residual=None) -> None; writes an adapter or, in
      full fine-tuning, a model.
    placement: the devices that hold the base model and train.
    identity: the model's name and fingerprints.
  """

  network: nn.Module
  trainable: Any
  frozen: Any
  adapter: lora.LoRA | None
  save: Callable[..., None]
  placement: clients.Placement
  identity: dict[str, str]


def load(
  model: str | os.PathLike,
  adapter: lora.LoRA | str | os.PathLike | None,
  head: heads.Classifier | None,
  *,
  dtype: Dtype,
  quantize: Quantize | None,
  remat: bool,
  placement: clients.Placement | None,
  seed: int,
) -> Loaded:
  """Loads a base model, and makes or loads the trained parameters.

  Args:
    model: Hugging Face folder or hub name.
    adapter: as in `tasks.language_model`.
    head: the head of a classifier; None for a language model.
    dtype: as in `tasks.language_model`.
    quantize: as in `tasks.language_model`.
    remat: as in `tasks.language_model`.
    placement: as in `tasks.language_model`.
    seed: seed of new parameters.

  Raises:
    ValueError: if the model or the adapter cannot be loaded, or `quantize` is
      given without an adapter.
  """
  is_full = adapter is None
  if is_full and quantize:
    raise ValueError(
      f"full fine-tuning trains the kernels, got {quantize=}. Leave it out, or"
      " give an adapter."
    )
  placement = placement or clients.Placement()
  folder = pretrained.resolve(model)
  config, frozen = pretrained.load(
    folder,
    head=head,
    dtype=jnp.dtype("float32" if is_full else dtype),
    quantize=quantize,
    sharding=placement.everywhere,
  )
  trainable = None
  identity = {
    "base_model": pathlib.Path(model).name,
    "base_model_fingerprint": pretrained.fingerprint(folder),
  }
  if isinstance(adapter, (str, os.PathLike)):
    start = pretrained.resolve(adapter)
    identity["adapter_fingerprint"] = pretrained.fingerprint(start)
    adapter, trainable = adapters.load(start, config)
  network = families.model(
    config, adapter, head, dtype=jnp.dtype(dtype), remat=remat
  )
  if is_full:
    shapes = lora.abstract_variables(network)["params"]
    trainable = heads.complete(frozen, shapes, draws.key(seed))
    frozen = {}
  elif trainable is None:
    trainable = lora.init(network, draws.key(seed), frozen)
  else:
    lora.check(network, trainable)
  return Loaded(
    network,
    trainable,
    frozen,
    adapter,
    _saver(adapter, config, str(model), head),
    placement,
    identity,
  )


def _saver(adapter, config, model, head):
  """Makes a function that writes an adapter, or a model if it has none."""

  def save(trained, folder, residual=None):
    if adapter is not None:
      named = dict(config=config, base_model=model, head=head)
      adapters.save(folder, trained, adapter, residual=residual, **named)
      return
    like = pretrained.resolve(model)
    pretrained.save(
      folder, config, trained, head=head, dtype=jnp.float32, like=like
    )

  return save
