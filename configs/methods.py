"""Any federated method by name, with or without privacy and a real network.

  fedjax-llm run methods --method fed_ex_lora
  fedjax-llm run methods --method flasc --density 0.0625 --epsilon 8
  fedjax-llm run methods --method linear_probe --data 20news-bydate.tar.gz

On the standard library of this machine, 36 clients, unless `--data` names tiny
Shakespeare's text (105 speakers) or the archive of 20 Newsgroups (350 clients).
What each method sends and trains is told in `docs/methods.md`; how methods
compare in `benchmarks/flasc/`. The same rates do not suit all of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax.flatten_util import ravel_pytree

import fedjax_llm as fl
from fedjax_llm.compression import base, levels, quantize, sparse
from fedjax_llm.data import corpora, records, sources, templates
from fedjax_llm.data import partition as partitions
from fedjax_llm.experiments import finetuning, runner, tasks
from fedjax_llm.federated import (
  channels,
  clients,
  densities,
  network,
  parameters,
)
from fedjax_llm.federated.algorithms import (
  delta_downloads,
  eco_lora,
  ef21,
  fed_avg,
  fed_ex_lora,
  fed_sa_lora,
  fed_sb,
  fed_srd,
  federated_select,
  fetch_sgd,
  flasc,
  flex_lora,
  flora,
  freezing,
  het_lora,
  pruning,
  scaffold,
)
from fedjax_llm.federated.privacy import guarantees, mechanisms
from fedjax_llm.models import decoder, lora, pretrained

Method = Literal[
  "fed_avg",
  "fed_adam",
  "fed_yogi",
  "fed_adagrad",
  "fed_avg_m",
  "fed_adamw",
  "fed_prox",
  "scaffold",
  "full_fine_tuning",
  "linear_probe",
  "flasc",
  "flasc_tiers",
  "top_k_with_error_feedback",
  "ef21",
  "fetch_sgd",
  "quantised",
  "delta_downloads",
  "sparse_adapter",
  "adapter_lth",
  "federated_select",
  "federated_select_ranks",
  "zero_padded_lora",
  "het_lora",
  "flex_lora",
  "flora",
  "ffa_lora",
  "ro_lora",
  "fed_sa_lora",
  "fed_ex_lora",
  "fed_sb",
  "eco_lora",
  "fed_srd",
]


class Knobs(NamedTuple):
  """What methods are made of: optimizers, the knobs below, and placement."""

  task: tasks.Task
  client: optax.GradientTransformation
  server: optax.GradientTransformation
  client_rate: float
  server_rate: float
  density: float
  upload_density: float
  warm_up_rounds: int
  rank: int
  rounds: int
  parts: dict[str, Any]

  @property
  def optimizers(self) -> tuple[Any, Any, Any]:
    """The arguments that most methods begin with."""
    return self.task.loss_fn, self.client, self.server

  @property
  def averaging(self) -> tuple[Any, Any, Any]:
    """The same, of a server that takes the mean."""
    return self.task.loss_fn, self.client, optax.sgd(1.0)

  @property
  def ranks(self) -> tuple[int, ...]:
    """Of three tiers: a sixteenth, a quarter, and all of the adapter's."""
    return tuple(max(1, self.rank // share) for share in (16, 4, 1))


def _adaptive(server: Callable[[float], Any]) -> Callable[[Knobs], Any]:
  return lambda k: fed_avg.fed_avg(
    k.task.loss_fn, k.client, server(k.server_rate), **k.parts
  )


def _fed_prox(k: Knobs) -> Any:
  client = optax.chain(clients.proximal(0.01), k.client)
  return fed_avg.fed_avg(k.task.loss_fn, client, optax.sgd(1.0), **k.parts)


def _flasc_tiers(k: Knobs) -> Any:
  shares = [rank / k.rank for rank in k.ranks]
  tiers = list(zip(shares, shares, strict=True))
  return flasc.flasc_tiers(*k.optimizers, tiers=tiers, **k.parts)


def _error_feedback(k: Knobs) -> Any:
  upload = base.error_feedback(sparse.top_k(k.density))
  channel = channels.Channel(upload=upload)
  return fed_avg.fed_avg(*k.optimizers, channel=channel, **k.parts)


def _fetch_sgd(k: Knobs) -> Any:
  """Sketches of `density`, and a tenth of it for what moves."""
  vector, _ = ravel_pytree(k.task.trainable)
  return fetch_sgd.fetch_sgd(
    k.task.loss_fn,
    k.client,
    rows=5,
    columns=max(1, round(k.density * vector.size / 5)),
    density=k.density / 10,
    settle=fetch_sgd.clear,
    **k.parts,
  )


def _quantised(k: Knobs) -> Any:
  """The share of 32 bits that the density says: 1 to 6, or 8."""
  bits = max(1, min(8, round(32 * k.density)))
  coarse = (
    quantize.lloyd_max(bits) if bits < 7 else levels.stochastic_uniform(8)
  )
  start, _ = ravel_pytree(k.task.trainable)
  channel = channels.Channel(base.relative_to(start, coarse), coarse)
  return fed_avg.fed_avg(*k.optimizers, channel=channel, **k.parts)


def _apart(k: Knobs) -> Callable[[float], base.Compressor]:
  owners = parameters.owners(k.task.trainable)
  return functools.partial(sparse.top_k_per_group, owners)


def _adapter_lth(k: Knobs) -> Any:
  schedule = densities.decaying(
    1.0,
    k.density ** (1 / 3),
    every=math.ceil(k.rounds / 6),
    rounds=k.rounds,
    floor=k.density,
  )
  return pruning.adapter_lth(
    *k.optimizers, density=schedule, top_k=_apart(k), **k.parts
  )


def _scale(k: Knobs) -> float:
  return k.task.adapter.scale if k.task.adapter else 1.0


METHODS: dict[str, Callable[[Knobs], Any]] = {
  "fed_avg": lambda k: fed_avg.fed_avg(*k.averaging, **k.parts),
  "fed_avg_m": _adaptive(fed_avg.fed_avg_m),
  "fed_adam": _adaptive(fed_avg.fed_adam),
  "fed_yogi": _adaptive(fed_avg.fed_yogi),
  "fed_adagrad": _adaptive(fed_avg.fed_adagrad),
  "fed_adamw": lambda k: fed_avg.fed_avg(*k.optimizers, **k.parts),
  "fed_prox": _fed_prox,
  "scaffold": lambda k: scaffold.scaffold(
    k.task.loss_fn, k.client_rate, optax.sgd(1.0), **k.parts
  ),
  "full_fine_tuning": lambda k: fed_avg.fed_avg(*k.optimizers, **k.parts),
  "linear_probe": lambda k: freezing.linear_probe(*k.optimizers, **k.parts),
  "flasc": lambda k: flasc.flasc(
    *k.optimizers,
    download_density=k.density,
    upload_density=k.upload_density,
    **k.parts,
  ),
  "flasc_tiers": _flasc_tiers,
  "top_k_with_error_feedback": _error_feedback,
  "ef21": lambda k: ef21.ef21(
    *k.averaging, upload=sparse.top_k(k.density), **k.parts
  ),
  "fetch_sgd": _fetch_sgd,
  "quantised": _quantised,
  "delta_downloads": lambda k: delta_downloads.delta_downloads(
    *k.optimizers,
    download=quantize.lloyd_max(2),
    upload=quantize.lloyd_max(1),
    **k.parts,
  ),
  "sparse_adapter": lambda k: pruning.sparse_adapter(
    *k.optimizers, density=k.density, top_k=_apart(k), **k.parts
  ),
  "adapter_lth": _adapter_lth,
  "federated_select": lambda k: federated_select.federated_select(
    *k.optimizers,
    density=k.density,
    warm_up_rounds=k.warm_up_rounds,
    top_k=_apart(k) if k.warm_up_rounds else sparse.top_k,
    **k.parts,
  ),
  "federated_select_ranks": lambda k: federated_select.federated_select_ranks(
    *k.optimizers, ranks=k.ranks, **k.parts
  ),
  "zero_padded_lora": lambda k: het_lora.zero_padded_lora(
    *k.optimizers, ranks=k.ranks, **k.parts
  ),
  "het_lora": lambda k: het_lora.het_lora(
    *k.averaging, ranks=k.ranks, **k.parts
  ),
  "flex_lora": lambda k: flex_lora.flex_lora(
    k.task.loss_fn, k.client, ranks=k.ranks, **k.parts
  ),
  "flora": lambda k: flora.flora(
    k.task.loss_fn, k.client, scale=_scale(k), **k.parts
  ),
  "ffa_lora": lambda k: freezing.ffa_lora(*k.optimizers, **k.parts),
  "ro_lora": lambda k: freezing.ro_lora(*k.optimizers, **k.parts),
  "fed_sa_lora": lambda k: fed_sa_lora.fed_sa_lora(*k.optimizers, **k.parts),
  "fed_ex_lora": lambda k: fed_ex_lora.fed_ex_lora(
    k.task.loss_fn, k.client, scale=_scale(k), **k.parts
  ),
  "fed_sb": lambda k: fed_sb.fed_sb(
    *k.optimizers,
    bases=fed_sb.random_bases(jax.random.key(k.task.seed)),
    **k.parts,
  ),
  "eco_lora": lambda k: eco_lora.eco_lora(
    *k.optimizers,
    segment_count=4,
    a_densities=(k.density, 1.0),
    b_densities=(k.density, 1.0),
    **k.parts,
  ),
  "fed_srd": lambda k: fed_srd.fed_srd(
    k.task.loss_fn,
    k.client,
    upload_density=k.density,
    download_density=k.density,
    **k.parts,
  ),
}
# Methods whose mean can be a private one.
PRIVATE = ("fed_adamw", "flasc", "ffa_lora", "full_fine_tuning", "linear_probe")


def experiment(
  *,
  method: Method = "flasc",
  data: str | None = None,
  model: str | None = None,
  seed: int = 0,
  rounds: int = 20,
  clients_per_round: int = 6,
  clients_per_step: int | None = None,
  rank: int = 16,
  targets: tuple[str, ...] = decoder.LINEAR,
  density: float = 0.25,
  upload_density: float | None = None,
  warm_up_rounds: int = 1,
  client_learning_rate: float = 0.3,
  server_learning_rate: float = 1e-2,
  local_steps: int = 4,
  batch_size: int = 4,
  sequence_length: int = 64,
  held_out_rows: int = 2,
  epsilon: float | None = None,
  delta: float = 1e-3,
  clip_norm: float = 1.0,
  links: Literal["ideal", "asymmetric"] = "ideal",
  dropout_before: float = 0.0,
  dropout_during: float = 0.0,
  deadline_seconds: float | None = None,
  over_selection: float = 1.0,
) -> runner.Experiment:
  """Fine-tune the shipped model, or another, by the method of your choice.

  Args:
    method: how; see `docs/methods.md`.
    data: tiny Shakespeare's `input.txt`, or `20news-bydate.tar.gz` to learn to
      classify; the standard library if not given.
    model: Hugging Face folder or hub name; the shipped one if not given.
    seed: of everything random.
    rounds: how many rounds.
    clients_per_round: clients that train in a round.
    clients_per_step: clients trained at once on a device; if not given, 1 on a
      CPU and 4 elsewhere.
    rank: of the LoRA factors; the scale of their product is 1.
    targets: names of the layers that get factors.
    density: share of the entries that sparse methods send, either way.
    upload_density: of FLASC's uploads, if another one: 1 for sparse downloads
      alone, as `density` 1 is for uploads alone.
    warm_up_rounds: dense ones of Federated Select; 0 for its authors' deadlock.
    client_learning_rate: of the clients' SGD with momentum 0.9.
    server_learning_rate: of the server's optimizer, where the method has one
      with a rate; AdamW unless the method's name says another.
    local_steps: at most so many local steps in a round.
    batch_size: rows a local step.
    sequence_length: tokens a row.
    held_out_rows: rows evaluated of each client, or posts by the hundred.
    epsilon: privacy of every client in the run, for methods in `PRIVATE`; with
      it cohorts are Poisson samples. None for no privacy.
    delta: of the privacy, below one in the clients.
    clip_norm: L2 norm that a client's update is clipped to for privacy.
    links: "asymmetric" gives three tiers of clients links whose upload is four
      to sixteen times slower, and tells a simulated time.
    dropout_before: chance that a client is gone before the round.
    dropout_during: chance that one does not answer.
    deadline_seconds: the server waits no longer; None for as long as it takes.
    over_selection: times as many clients are selected as are wanted.
  """
  task = _task(
    data,
    model or pretrained.SHIPPED,
    None
    if method == "full_fine_tuning"
    else lora.LoRA(rank, float(rank), 0.0, targets),
    sequence_length,
    held_out_rows,
    fl.Placement(clients_per_step=clients_per_step),
    seed,
  )
  parts: dict[str, Any] = {
    "population": len(task.population.names),
    "placement": task.placement,
  }
  guarantee = None
  if epsilon is not None:
    guarantee = _guarantee(
      method, epsilon, delta, rounds, parts["population"], clients_per_round
    )
    parts["aggregate"] = mechanisms.private_mean(
      clip_norm=clip_norm,
      noise_multiplier=guarantee.noise_multiplier,
      clients=clients_per_round,
    )
  knobs = Knobs(
    task,
    optax.sgd(client_learning_rate, momentum=0.9),
    flasc.server_adamw(server_learning_rate),
    client_learning_rate,
    server_learning_rate,
    density,
    density if upload_density is None else upload_density,
    warm_up_rounds,
    rank,
    rounds,
    parts,
  )
  is_ideal = (
    links == "ideal"
    and over_selection == 1
    and not (dropout_before or dropout_during or deadline_seconds)
  )
  return finetuning.federated(
    task,
    METHODS[method](knobs),
    rounds=rounds,
    clients_per_round=clients_per_round,
    batch_size=batch_size,
    local_steps=local_steps,
    sampling="fixed" if epsilon is None else "poisson",
    privacy=guarantee,
    network=None
    if is_ideal
    else network.Network(
      tiers=TIERS if links == "asymmetric" else TIERS[-1:],
      dropout_before=dropout_before,
      dropout_during=dropout_during,
      deadline_seconds=deadline_seconds,
      over_selection=over_selection,
      seed=seed,
    ),
  )


# Megabits a second down and up, seconds of latency and of a local step.
TIERS = (
  network.Link(4, 0.25, 0.1, 0.2),
  network.Link(16, 2, 0.05, 0.1),
  network.Link(64, 16, 0.02, 0.05),
)


def _task(
  data, model, adapter, sequence_length, held_out_rows, placement, seed
):
  """The task that the data is for."""
  if data is None or not data.endswith(".tar.gz"):
    corpus = corpora.shakespeare(data) if data else corpora.standard_library()
    return tasks.language_model(
      records.streams(corpus, held_out_rows),
      model=model,
      adapter=adapter,
      sequence_length=sequence_length,
      placement=placement,
      seed=seed,
    )
  test: Any = sources.newsgroups(data, "test", subject=True)
  source = records.classified(
    sources.newsgroups(data, "train", subject=True),
    templates.plain("text"),
    partitions.dirichlet_by_client(clients=350, alpha=0.1, seed=seed),
    held_out=test.shuffle(seed=seed),
    held_out_rows=100 * held_out_rows,
    seed=seed,
  )
  return tasks.classifier(
    source,
    model=model,
    adapter=adapter,
    sequence_length=sequence_length,
    pooling="mean",
    placement=placement,
    seed=seed,
  )


def _guarantee(method, epsilon, delta, rounds, population, clients_per_round):
  """Client-level privacy of the run, with the noise that epsilon needs."""
  if method not in PRIVATE:
    raise ValueError(
      f"epsilon expected a method of {', '.join(PRIVATE)}, got {method}."
    )
  guarantee = guarantees.ClientLevel(
    noise_multiplier=1.0,
    delta=delta,
    sampling="poisson",
    population=population,
    clients_per_round=clients_per_round,
  )
  noise = guarantees.noise_multiplier_for(epsilon, rounds, guarantee)
  return dataclasses.replace(guarantee, noise_multiplier=noise)
