"""CG-FedLLM: federated fine-tuning through a learned codec, and without it.

fedjax-llm run tgap
fedjax-llm run cg_fedllm --codec runs/tgap/codec

The second stage of CG-FedLLM (arXiv 2405.13746), called FAF. It trains on D2,
the rows of every client that the codec of `tgap` was not fitted on. See
`docs/learned_compression.md`.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
import optax

import fedjax_llm as fl
from fedjax_llm.codecs import files, fitting
from fedjax_llm.compression import base
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import (
  faf,
  finetuning,
  knobs,
  runner,
  tasks,
  tgap,
)
from fedjax_llm.federated import aggregators
from fedjax_llm.federated.algorithms import cg_fed_llm, fed_avg
from fedjax_llm.models import decoder


@dataclasses.dataclass(frozen=True)
class Refit:
  """When and how an autoencoder is refitted to updates at the server.

  Attributes:
    refit_every: rounds between fits; None for a frozen codec.
    volunteers: share of the clients, counted from the first, that also send
      their updates uncompressed, for the refits.
    fit_steps: steps of a fit.
    fit_learning_rate: learning rate of a fit.
  """

  refit_every: int | None = None
  volunteers: float = 0.2
  fit_steps: int = 300
  fit_learning_rate: float = 1e-3


def experiment(
  *,
  codec: str = "runs/tgap/codec",
  bits: float = 0.5,
  representation: cg_fed_llm.Representation | None = None,
  aggregation: Literal["mean", "sum", "product"] = "mean",
  error_feedback: bool = False,
  unbiased: bool | None = None,
  refit: Refit = Refit(),
  seed: int = 0,
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=16,
    clients_per_round=6,
    batch_size=4,
    local_steps=4,
    evaluate_every=4,
  ),
  adapter: fl.LoRA = fl.LoRA(alpha=4.0, targets=decoder.LINEAR),
  client_learning_rate: float = 3e-3,
  sequence_length: int = 128,
  held_out_rows: int = 2,
  compute: knobs.Compute = knobs.Compute(),
) -> dict[str, runner.Experiment]:
  """Fine-tune the shipped model, uncompressed and compressed, from one seed.

  Args:
    codec: folder that `tgap` wrote for the same adapter.
    bits: mean bits per entry of a transform. The bits of an autoencoder were
      chosen when it was fitted.
    representation: "delta" or "state", see `tgap`; None for the one that the
      codec was fitted to.
    aggregation: how decoded updates are combined: their "mean", weighted by the
      clients' examples; their "sum", as in Algorithm 1 of the paper; or the
      mean "product" of the factors, decomposed into factors.
    error_feedback: whether a client adds the codec's error to its next update.
    unbiased: True for unbiased messages of a transform, for means over many
      clients; False for the least error of each message. None for False with
      states or error feedback, and else True.
    refit: when and how an autoencoder is refitted.
    seed: seed of every random draw, except for the division into D1 and D2,
      which uses the seed of the codec's run.
    schedule: the rounds and what happens in each.
    adapter: the LoRA factors.
    client_learning_rate: learning rate of the clients' AdamW.
    sequence_length: tokens in a row, the same as in the codec's run.
    held_out_rows: rows evaluated of each client's held-out files.
    compute: how the model is computed.
  """
  task = tasks.language_model(
    records.streams(corpora.standard_library(), held_out_rows),
    adapter=adapter,
    sequence_length=sequence_length,
    seed=seed,
    **compute.settings,
  )
  fitted, about = files.load(codec, task.trainable)
  representation = representation or about["representation"]
  if representation != about["representation"]:
    raise ValueError(
      f"the codec in {codec} was fitted to the {about['representation']}, got"
      f" {representation=}. Run tgap with it."
    )
  if sequence_length != about["sequence_length"]:
    raise ValueError(
      f"the codec in {codec} was fitted to rows of {about['sequence_length']}"
      f" tokens, got {sequence_length=}: rows of another length are divided"
      " differently, so D2 would overlap with D1. Run tgap with it."
    )
  is_refitted = refit.refit_every is not None
  if error_feedback and (representation == "state" or is_refitted):
    raise ValueError(
      "error_feedback adds up updates: expected representation 'delta' and a"
      " codec that is not refitted, as the server would not know what went into"
      f" it; got {representation=}, refit_every={refit.refit_every}."
    )
  _, task = tgap.divided(task, about["share"], seed=about["seed"])
  data = {**task.data, "codec_fingerprint": about["fingerprint"]}
  task = dataclasses.replace(task, data=data)
  population = len(task.population.names)
  client = optax.adamw(client_learning_rate, weight_decay=0.0)
  if unbiased is None:
    unbiased = representation == "delta" and not error_feedback
  if unbiased and error_feedback:
    raise ValueError(
      "error_feedback needs a code of the least error: what an unbiased one"
      " loses grows from message to message. Leave --unbiased out."
    )
  coding = faf.coding(
    fitted,
    bits=bits,
    unbiased=unbiased,
    is_refitted=is_refitted,
  )
  if error_feedback:
    of = coding.compressor_of
    coding = coding._replace(
      compressor_of=lambda codec: base.error_feedback(of(codec))
    )
  volunteers = np.arange(population) < round(refit.volunteers * population)
  parts = dict(
    coding=coding,
    population=population,
    representation=representation,
    volunteers=volunteers if is_refitted else None,
    placement=task.placement,
  )
  if aggregation == "product":
    algorithm = cg_fed_llm.cg_fed_llm_products(task.loss_fn, client, **parts)
  else:
    algorithm = cg_fed_llm.cg_fed_llm(
      task.loss_fn,
      client,
      optax.sgd(1.0),
      aggregate=aggregators.sum_updates() if aggregation == "sum" else None,
      **parts,
    )
  compressed = finetuning.fine_tuning(task, algorithm, schedule)
  if refit.refit_every is not None:
    settings = fitting.Settings(
      steps=refit.fit_steps, learning_rate=refit.fit_learning_rate, seed=seed
    )
    fit = functools.partial(faf.refit, settings=settings)
    compressed = faf.refitted(compressed, fit, every=refit.refit_every)
  uncompressed = fed_avg.fed_avg(
    task.loss_fn, client, optax.sgd(1.0), placement=task.placement
  )
  return {
    "uncompressed": finetuning.fine_tuning(task, uncompressed, schedule),
    "cg_fedllm": compressed,
  }
