"""CG-FedLLM: federated fine-tuning through a learned codec, and without it.

fedjax-llm run tgap
fedjax-llm run cg_fedllm --codec runs/tgap/codec

On D2, the rows of every client that the codec of `tgap` has not seen (arXiv
2405.13746, which calls this stage FAF). See `docs/learned_compression.md`.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
import optax

import fedjax_llm as fl
from fedjax_llm.compression import base
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import (
  finetuning,
  learned_codecs,
  runner,
  tasks,
  tgap,
)
from fedjax_llm.federated import aggregators, codec_rounds
from fedjax_llm.federated.algorithms import cg_fed_llm, fed_avg
from fedjax_llm.models import decoder, lora


def experiment(
  *,
  codec: str = "runs/tgap/codec",
  bits: float = 0.5,
  representation: codec_rounds.Representation | None = None,
  aggregation: Literal["mean", "sum", "product"] = "mean",
  error_feedback: bool = False,
  unbiased: bool | None = None,
  refit_every: int | None = None,
  volunteers: float = 0.2,
  fit_steps: int = 300,
  fit_learning_rate: float = 1e-3,
  seed: int = 0,
  rounds: int = 16,
  clients_per_round: int = 6,
  clients_per_step: int | None = None,
  rank: int = 8,
  alpha: float = 4.0,
  dropout: float = 0.0,
  targets: tuple[str, ...] = decoder.LINEAR,
  client_learning_rate: float = 3e-3,
  local_epochs: int = 1,
  local_steps: int = 4,
  batch_size: int = 4,
  sequence_length: int = 128,
  held_out_rows: int = 2,
  dtype: tasks.Dtype = "float32",
) -> dict[str, runner.Experiment]:
  """Fine-tune the shipped model, uncompressed and compressed, from one seed.

  Args:
    codec: folder that `tgap` wrote, of the same adapter.
    bits: of an entry on average, if the codec is a transform; how many an
      autoencoder sends was chosen when it was fitted.
    representation: what goes through the codec, see `tgap`; None for what it
      was fitted to.
    aggregation: "mean" of what arrives, weighted by the clients' examples; the
      "sum", as in Algorithm 1 of the paper; or the mean "product" of the
      factors, decomposed.
    error_feedback: add what the codec lost of an update to the client's next.
    unbiased: whether a transform is coded for means over many clients, or for
      the least error of each message; None for the former, but for states and
      under error feedback, which need the latter.
    refit_every: rounds between fits of an autoencoder to what the server has
      got; None for a frozen codec.
    volunteers: share of the clients, the first ones, that send their updates
      uncompressed too, to refit the codec on.
    fit_steps: of a refit.
    fit_learning_rate: of a refit.
    seed: of everything random but D1 and D2, which are those of the codec.
    rounds: how many rounds.
    clients_per_round: clients that train in a round, of 30 or more.
    clients_per_step: clients trained at once on a device; if not given, 1 on a
      CPU and 4 elsewhere.
    rank: of the LoRA factors.
    alpha: the factors' product is scaled by alpha / rank.
    dropout: on the inputs of the factors.
    targets: names of the layers that get factors.
    client_learning_rate: of the clients' AdamW.
    local_epochs: passes of a client over its rows in a round.
    local_steps: at most so many local steps in a round.
    batch_size: rows a local step.
    sequence_length: tokens a row, as many as in the codec's run.
    held_out_rows: rows evaluated of each client's held-out files.
    dtype: what the base model is computed in.
  """
  task = tasks.language_model(
    records.streams(corpora.standard_library(), held_out_rows),
    adapter=lora.LoRA(rank, alpha, dropout, targets),
    sequence_length=sequence_length,
    dtype=dtype,
    placement=fl.Placement(clients_per_step=clients_per_step),
    seed=seed,
  )
  fitted, about = learned_codecs.load(codec, task.trainable)
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
      " anew, and D2 would have what D1 had. Run tgap with it."
    )
  if error_feedback and (representation == "state" or refit_every is not None):
    raise ValueError(
      "error_feedback adds up updates: expected representation 'delta' and a"
      " codec that is not refitted, as the server would not know what went into"
      f" it; got {representation=}, {refit_every=}."
    )
  _, task = tgap.divided(task, about["share"], seed=about["seed"])
  data = {**task.data, "codec_fingerprint": about["fingerprint"]}
  task = dataclasses.replace(task, data=data)
  population = len(task.population.names)
  client = optax.adamw(client_learning_rate, weight_decay=0.0)
  placement = dict(placement=task.placement)

  def made(algorithm):
    return finetuning.federated(
      task,
      algorithm,
      rounds=rounds,
      clients_per_round=clients_per_round,
      batch_size=batch_size,
      local_epochs=local_epochs,
      local_steps=local_steps,
      weighting="examples",
      evaluate_every=4,
    )

  if unbiased is None:
    unbiased = representation == "delta" and not error_feedback
  if unbiased and error_feedback:
    raise ValueError(
      "error_feedback needs a code of the least error: what an unbiased one"
      " loses grows from message to message. Leave --unbiased out."
    )
  coding = learned_codecs.coding(
    fitted,
    bits=bits,
    unbiased=unbiased,
    is_refitted=refit_every is not None,
  )
  if error_feedback:
    of = coding["compressor_of"]
    coding["compressor_of"] = lambda codec: base.error_feedback(of(codec))
  coding |= dict(
    population=population,
    representation=representation,
    volunteers=None
    if refit_every is None
    else np.arange(population) < round(volunteers * population),
    **placement,
  )
  if aggregation == "product":
    algorithm = cg_fed_llm.cg_fed_llm_products(task.loss_fn, client, **coding)
  else:
    algorithm = cg_fed_llm.cg_fed_llm(
      task.loss_fn,
      client,
      optax.sgd(1.0),
      aggregate=aggregators.sum_updates() if aggregation == "sum" else None,
      **coding,
    )
  compressed = made(algorithm)
  if refit_every is not None:
    refit = functools.partial(
      tgap.refit,
      steps=fit_steps,
      learning_rate=fit_learning_rate,
      seed=seed,
    )
    compressed = tgap.refitted(compressed, refit, every=refit_every)
  uncompressed = fed_avg.fed_avg(
    task.loss_fn, client, optax.sgd(1.0), **placement
  )
  return {"uncompressed": made(uncompressed), "cg_fedllm": compressed}
