"""TGAP: record updates on a part of every client's data, fit a codec on them.

fedjax-llm run tgap

The first half of CG-FedLLM (arXiv 2405.13746): `run cg_fedllm` fine-tunes on
the rest of the data through the codec, which is in `runs/tgap/codec` with a
report of what it transmits. See `docs/learned_compression.md`.
"""

import functools
from typing import Literal

import optax

import fedjax_llm as fl
from fedjax_llm.codecs import (
  autoencoder,
  fitting,
  layouts,
  networks,
  row_network,
)
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import learned_codecs, runner, tasks
from fedjax_llm.experiments import tgap as learned_compression
from fedjax_llm.federated import codec_rounds
from fedjax_llm.federated.algorithms import tgap
from fedjax_llm.models import decoder, lora

Codec = Literal["transform", "rows", "resnet", "resnet_linear", "convolutional"]
# Columns of the image that the network of rows sees.
WIDTH = 256


def experiment(
  *,
  pretraining: Literal["federated", "local"] = "federated",
  source: learned_compression.Source = "updates",
  representation: codec_rounds.Representation = "delta",
  share: float = 0.3,
  codec: Codec = "transform",
  bits: float = 0.5,
  latent_bits: int | None = 1,
  normalise: fitting.Normalise = "columns",
  fit_steps: int = 400,
  fit_batch_size: int = 4,
  fit_learning_rate: float = 1e-3,
  seed: int = 0,
  rounds: int = 10,
  clients_per_round: int = 10,
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
) -> runner.Experiment:
  """Record updates of the shipped model's adapter, and fit a codec on them.

  Args:
    pretraining: "federated" averaging on D1, as the paper's last version has
      it; or "local", each client alone, as its first.
    source: fit to "updates", or to samples of a "gaussian_prior" with their
      moments, which is all that clients tell then (arXiv 2412.17053).
    representation: record the "delta", received minus trained; or the "state",
      the whole adapter.
    share: of every client's rows that are D1.
    codec: "transform" is ours, principal axes with a trellis after them. The
      others are autoencoders: "rows" is ours; "resnet" and "convolutional" are
      the paper's, and "resnet_linear" has eight channels at full resolution and
      no tanh. `latent_bits`, `normalise` and `fit_*` are of these alone.
    bits: of an entry, at which a transform is reported; those that it sends at
      are chosen when it is used.
    latent_bits: of an entry of the latent; None for float32, as in the paper.
    normalise: what images are divided by: the root mean square of "columns", of
      all as "one", or "none", of which the paper says nothing.
    fit_steps: at most, of the codec's Adam.
    fit_batch_size: snapshots a step.
    fit_learning_rate: of the codec's Adam; 2e-4 in the paper.
    seed: of everything random.
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
    sequence_length: tokens a row.
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
  task, _ = learned_compression.divided(task, share, seed=seed)
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
  # What would fail after all is recorded fails now.
  if rounds < 2:
    raise ValueError(
      f"expected two rounds or more, the last ones to judge by, got {rounds=}."
    )
  if codec == "transform":
    learned_codecs.check_bits(task.trainable, bits)
    finish = functools.partial(
      learned_codecs.fit_transform, trainable=task.trainable, bits=bits
    )
  else:
    arrangement, network = _network(codec, latent_bits, task.trainable)
    autoencoder.latent_quantiser(network)
    fitting.check(
      steps=fit_steps, batch_size=fit_batch_size, normalise=normalise
    )
    finish = functools.partial(
      learned_codecs.fit_autoencoder,
      arrangement=arrangement,
      network=network,
      steps=fit_steps,
      batch_size=fit_batch_size,
      learning_rate=fit_learning_rate,
      normalise=normalise,
      seed=seed,
    )
  return learned_compression.recorded(
    task,
    algorithm,
    representation=representation,
    source=source,
    about={
      "pretraining": pretraining,
      "share": share,
      "seed": seed,
      "sequence_length": sequence_length,
    },
    finish=finish,
    rounds=rounds,
    clients_per_round=clients_per_round,
    batch_size=batch_size,
    local_epochs=local_epochs,
    local_steps=local_steps,
    weighting="examples",
  )


def _network(name, bits, trainable):
  """How vectors are arranged, and the network that sees them so."""
  if name == "rows":
    columns = layouts.columns(trainable, width=WIDTH)
    return columns, row_network.network(WIDTH, latents=WIDTH // 2, bits=bits)
  made = {
    "resnet": networks.resnet,
    "resnet_linear": functools.partial(networks.resnet, stem=8, linear=True),
    "convolutional": networks.convolutional,
  }
  return layouts.flat(trainable), made[name](bits=bits)
