"""Any federated method by name, with optional privacy and simulated network.

  fedjax-llm run methods --method fed_ex_lora
  fedjax-llm run methods --method flasc --density 0.0625 --epsilon 8
  fedjax-llm run methods --method linear_probe --data 20news-bydate.tar.gz

The data are the standard library of this machine (36 clients), unless `--data`
names tiny Shakespeare's text (105 speakers) or the archive of 20 Newsgroups
(350 clients). `docs/methods.md` says what each method sends and trains, and
`benchmarks/flasc/` compares them. Methods need different learning rates.
"""

import dataclasses
from typing import Any, Literal

import fedjax_llm as fl
from fedjax_llm.data import corpora, records, sources, templates
from fedjax_llm.data import partition as partitions
from fedjax_llm.experiments import finetuning, knobs, methods, runner, tasks
from fedjax_llm.federated import network
from fedjax_llm.federated.privacy import guarantees, mechanisms
from fedjax_llm.models import decoder, pretrained


@dataclasses.dataclass(frozen=True)
class Sparsity:
  """How much sparse methods send.

  Attributes:
    density: share of the entries that sparse methods send, down and up.
    upload_density: share of the entries in FLASC's uploads; None for `density`.
      With 1 only downloads are sparse, and with `density` 1 only uploads.
    warm_up_rounds: dense rounds before Federated Select; 0 as in its authors'
      code, which gets stuck.
  """

  density: float = 0.25
  upload_density: float | None = None
  warm_up_rounds: int = 1


@dataclasses.dataclass(frozen=True)
class Privacy:
  """Privacy of every client, for the methods in `methods.PRIVATE`.

  Attributes:
    epsilon: epsilon of the whole run, whose cohorts become Poisson samples;
      None for no privacy.
    delta: delta of the run, below 1 / the number of clients.
    clip_norm: L2 norm that a client's update is clipped to.
  """

  epsilon: float | None = None
  delta: float = 1e-3
  clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Links:
  """The clients' links and their reliability.

  Attributes:
    links: "asymmetric" for three tiers of clients whose uploads are four to
      sixteen times slower than downloads; the time of a round is simulated.
    dropout_before: probability that a client is gone before the round.
    dropout_during: probability that a client does not answer.
    deadline_seconds: how long the server waits; None for no deadline.
    over_selection: selected clients per wanted client, at least 1.
  """

  links: Literal["ideal", "asymmetric"] = "ideal"
  dropout_before: float = 0.0
  dropout_during: float = 0.0
  deadline_seconds: float | None = None
  over_selection: float = 1.0

  def network(self, seed: int) -> network.Network | None:
    """The network; None if every client answers at once."""
    if self == Links():
      return None
    tiers = network.ASYMMETRIC
    return network.Network(
      tiers=tiers if self.links == "asymmetric" else tiers[-1:],
      dropout_before=self.dropout_before,
      dropout_during=self.dropout_during,
      deadline_seconds=self.deadline_seconds,
      over_selection=self.over_selection,
      seed=seed,
    )


def experiment(
  *,
  method: methods.Method = "flasc",
  data: str | None = None,
  model: str | None = None,
  seed: int = 0,
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=20, clients_per_round=6, batch_size=4, local_steps=4
  ),
  rank: int = 16,
  targets: tuple[str, ...] = decoder.LINEAR,
  sparsity: Sparsity = Sparsity(),
  rates: knobs.Rates = knobs.Rates(0.3),
  sequence_length: int = 64,
  held_out_rows: int = 2,
  compute: knobs.Compute = knobs.Compute(),
  privacy: Privacy = Privacy(),
  links: Links = Links(),
) -> runner.Experiment:
  """Fine-tune the shipped model, or another, by the method that you name.

  Args:
    method: the method; see `docs/methods.md`.
    data: tiny Shakespeare's `input.txt`, or `20news-bydate.tar.gz` for
      classification; the standard library if not given.
    model: Hugging Face folder or hub name; the shipped one if not given.
    seed: seed of every random draw.
    schedule: the rounds and what happens in each.
    rank: the LoRA rank; the scale of the factors' product is 1.
    targets: names of the layers that get factors.
    sparsity: how much sparse methods send.
    rates: the learning rates. Methods without a server rate ignore it; others
      use AdamW at the server, unless their name has another optimizer.
    sequence_length: tokens in a row.
    held_out_rows: rows to evaluate of each client, or hundreds of test posts.
    compute: how the model is computed.
    privacy: privacy of every client.
    links: the clients' links and their reliability.
  """
  is_full = method == "full_fine_tuning"
  task = _task(
    data,
    held_out_rows,
    model=model or pretrained.SHIPPED,
    adapter=None if is_full else fl.LoRA(rank, float(rank), targets=targets),
    sequence_length=sequence_length,
    seed=seed,
    **compute.settings,
  )
  guarantee, aggregate = None, None
  if privacy.epsilon is not None:
    schedule = dataclasses.replace(schedule, sampling="poisson")
    guarantee = _guarantee(method, privacy, schedule, task)
    aggregate = mechanisms.private_mean(
      clip_norm=privacy.clip_norm,
      noise_multiplier=guarantee.noise_multiplier,
      clients=schedule.clients_per_round,
    )
  upload_density = sparsity.upload_density
  recipe = methods.Recipe(
    task=task,
    rates=rates,
    server=rates.server,
    density=sparsity.density,
    upload_density=(
      sparsity.density if upload_density is None else upload_density
    ),
    rank=rank,
    rounds=schedule.rounds,
    warm_up_rounds=sparsity.warm_up_rounds,
    aggregate=aggregate,
  )
  return finetuning.fine_tuning(
    task,
    methods.METHODS[method](recipe),
    schedule,
    network=links.network(seed),
    privacy=guarantee,
  )


def _task(data, held_out_rows, *, seed, **settings):
  """Makes a task from the data: language modelling or classification."""
  if data is None or not data.endswith(".tar.gz"):
    corpus = corpora.shakespeare(data) if data else corpora.standard_library()
    source = records.streams(corpus, held_out_rows)
    return tasks.language_model(source, seed=seed, **settings)
  test: Any = sources.newsgroups(data, "test", subject=True)
  source = records.classified(
    sources.newsgroups(data, "train", subject=True),
    templates.plain("text"),
    partitions.dirichlet_by_client(clients=350, alpha=0.1, seed=seed),
    held_out=test.shuffle(seed=seed),
    held_out_rows=100 * held_out_rows,
    seed=seed,
  )
  return tasks.classifier(source, pooling="mean", seed=seed, **settings)


def _guarantee(method, privacy, schedule, task):
  """Client-level privacy of the run, with the noise that epsilon needs."""
  if method not in methods.PRIVATE:
    raise ValueError(
      f"epsilon expected a method of {', '.join(methods.PRIVATE)}, got"
      f" {method}."
    )
  guarantee = guarantees.ClientLevel(
    noise_multiplier=1.0,
    delta=privacy.delta,
    sampling="poisson",
    population=len(task.population.names),
    clients_per_round=schedule.clients_per_round,
  )
  noise = guarantees.noise_multiplier_for(
    privacy.epsilon, schedule.rounds, guarantee
  )
  return dataclasses.replace(guarantee, noise_multiplier=noise)
