"""TGAP: record updates on a part of every client's data, and fit a codec.

fedjax-llm run tgap

The first stage of CG-FedLLM (arXiv 2405.13746). Then `run cg_fedllm` fine-tunes
on the rest of the data through the codec. `runs/tgap/codec` has the codec and a
report of what it transmits. See `docs/learned_compression.md`.
"""

import dataclasses
import functools
from typing import Literal

import optax

import fedjax_llm as fl
from fedjax_llm.codecs import (
  fitting,
  layouts,
  networks,
  row_network,
)
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import (
  finetuning,
  knobs,
  runner,
  tasks,
)
from fedjax_llm.experiments import tgap as experiments
from fedjax_llm.federated.algorithms import cg_fed_llm, tgap
from fedjax_llm.models import decoder

Codec = Literal["transform", "rows", "resnet", "resnet_linear", "convolutional"]
# Columns of the image that the network of rows sees.
WIDTH = 256


@dataclasses.dataclass(frozen=True)
class Fit:
  """The codec, and how it is fitted.

  Attributes:
    codec: "transform" is ours: principal axes, then a trellis code. The others
      are autoencoders: "rows" is ours; "resnet" and "convolutional" are
      the paper's, and "resnet_linear" has eight channels at full resolution and
      no tanh. `latent_bits`, `normalise` and `fit_*` are for autoencoders only.
    bits: bits per entry in the report of a transform. The bits that it sends
      are chosen when it is used.
    latent_bits: bits per entry of the latent; None for float32, as in the
      paper.
    normalise: what images are divided by: the root mean square of each of the
      "columns", that of all entries ("one"), or nothing ("none"). The paper
      does not say.
    fit_steps: largest number of steps of the codec's Adam.
    fit_batch_size: snapshots in a step.
    fit_learning_rate: learning rate of the codec's Adam; 2e-4 in the paper.
  """

  codec: Codec = "transform"
  bits: float = 0.5
  latent_bits: int | None = 1
  normalise: fitting.Normalise = "columns"
  fit_steps: int = 400
  fit_batch_size: int = 4
  fit_learning_rate: float = 1e-3


def experiment(
  *,
  pretraining: Literal["federated", "local"] = "federated",
  source: experiments.Source = "updates",
  representation: cg_fed_llm.Representation = "delta",
  share: float = 0.3,
  fit: Fit = Fit(),
  seed: int = 0,
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=10, clients_per_round=10, batch_size=4, local_steps=4
  ),
  adapter: fl.LoRA = fl.LoRA(alpha=4.0, targets=decoder.LINEAR),
  client_learning_rate: float = 3e-3,
  sequence_length: int = 128,
  held_out_rows: int = 2,
  compute: knobs.Compute = knobs.Compute(),
) -> runner.Experiment:
  """Record updates of the shipped model's adapter, and fit a codec on them.

  Args:
    pretraining: "federated" averaging on D1, as in the paper's last version; or
      "local" training of each client alone, as in its first version.
    source: what the codec is fitted to: "updates", or samples of a
      "gaussian_prior" with their moments. Then clients send the moments only
      (arXiv 2412.17053).
    representation: what is recorded: the "delta", received minus trained; or
      the "state", the whole adapter.
    share: share of every client's rows that are D1.
    fit: the codec, and how it is fitted.
    seed: seed of every random draw.
    schedule: the rounds and what happens in each.
    adapter: the LoRA factors.
    client_learning_rate: learning rate of the clients' AdamW.
    sequence_length: tokens in a row.
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
  task, _ = experiments.divided(task, share, seed=seed)
  parts = dict(
    population=len(task.population.names),
    representation=representation,
    placement=task.placement,
  )
  client = optax.adamw(client_learning_rate, weight_decay=0.0)
  if pretraining == "local":
    algorithm = tgap.local_pretraining(task.loss_fn, client, **parts)
  else:
    algorithm = tgap.federated_pretraining(
      task.loss_fn, client, optax.sgd(1.0), **parts
    )
  # Raises an error now, and not after everything is recorded.
  if schedule.rounds < 2:
    raise ValueError(
      "expected two rounds or more, the last ones for evaluation, got"
      f" rounds={schedule.rounds}."
    )
  if fit.codec == "transform":
    finish = experiments.fit_transform(task.trainable, fit.bits)
  else:
    layout, network = _network(fit, task.trainable)
    settings = fitting.Settings(
      steps=fit.fit_steps,
      batch_size=fit.fit_batch_size,
      learning_rate=fit.fit_learning_rate,
      normalise=fit.normalise,
      seed=seed,
    )
    finish = experiments.fit_autoencoder(layout, network, settings)
  return experiments.recorded(
    task,
    algorithm,
    schedule,
    representation=representation,
    source=source,
    about={
      "pretraining": pretraining,
      "share": share,
      "seed": seed,
      "sequence_length": sequence_length,
    },
    finish=finish,
  )


def _network(fit, trainable):
  """Returns the layout of vectors, and the network for their images."""
  bits = fit.latent_bits
  if fit.codec == "rows":
    columns = layouts.columns(trainable, width=WIDTH)
    return columns, row_network.network(WIDTH, latents=WIDTH // 2, bits=bits)
  made = {
    "resnet": networks.resnet,
    "resnet_linear": functools.partial(networks.resnet, stem=8, linear=True),
    "convolutional": networks.convolutional,
  }
  return layouts.flat(trainable), made[fit.codec](bits=bits)
