"""Federated fine-tuning, as an experiment.

task = tasks.language_model(records.streams(corpora.standard_library()), ...)
algorithm = flasc.flasc(task.loss_fn, optax.sgd(0.1), ...)
schedule = finetuning.Schedule(rounds=20, clients_per_round=6, batch_size=4)
experiment = finetuning.fine_tuning(task, algorithm, schedule)
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from fedjax_llm.data import cohorts
from fedjax_llm.experiments import (
  codec_gate,
  compatibility,
  programs,
  runner,
  tasks,
)
from fedjax_llm.federated import draws, rounds
from fedjax_llm.federated import network as networks
from fedjax_llm.federated.privacy import guarantees
from fedjax_llm.models import lora


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long a run is, and what happens in each round.

  Attributes:
    rounds: number of rounds.
    clients_per_round: clients in a round; with Poisson sampling, on average.
    batch_size: examples in a local step.
    local_epochs: passes of a client over its examples in a round.
    local_steps: largest number of local steps in a round; None for no limit.
    sampling: how clients are sampled, see `data.cohorts.cohort_sampler`.
    evaluate_every: rounds between evaluations.
    checkpoint_every: rounds between checkpoints.

  Raises:
    ValueError: if a number is not a whole number of at least 1.
  """

  rounds: int
  clients_per_round: int
  batch_size: int
  local_epochs: int = 1
  local_steps: int | None = None
  sampling: Literal["fixed", "poisson"] = "fixed"
  evaluate_every: int = 5
  checkpoint_every: int = 5

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if name == "sampling" or (name == "local_steps" and value is None):
        continue
      if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(
          f"Schedule expected {name} >= 1, a whole number, got {value!r}."
        )


def fine_tuning(
  task: tasks.Task,
  algorithm: rounds.FederatedAlgorithm,
  schedule: Schedule,
  *,
  network: networks.Network | None = None,
  privacy: guarantees.Guarantee | None = None,
  observe: Callable[..., None] | None = None,
) -> runner.Experiment:
  """Makes an experiment that runs a federated algorithm on a task.

  The weight of a client is the number of its examples. The algorithm's
  aggregator decides how to use the weights.

  Args:
    task: the model and the data.
    algorithm: the federated method.
    schedule: the rounds, and what happens in each.
    network: the clients' links and their reliability; None if every client
      answers at once.
    privacy: the guarantee of `algorithm`. Evaluations have the metric `epsilon`
      if it is finite. The export prints the guarantee of the finished run and
      writes it to `privacy.txt`.
    observe: called after each round with (round, cohort, metrics). It is called
      again for rounds that are computed again after a process was killed.

  Returns:
    An experiment. `loss` and the exported `adapter` are those of the model that
    clients receive; in FLASC it is masked. `server_loss` is the loss of the
    parameters that the server keeps. Metrics of a round:

    - `download_bytes`, `upload_bytes`: bytes of all messages; `..._per_client`:
      bytes of the largest message.
    - `download_entries`, `upload_entries`: how many numbers all messages hold.
      A message with fewer than `trainable` numbers is sparse.
    - `train_loss`, `tokens`: values for the clients that answered.
    - `selected`, `answered`, `simulated_seconds`: only with a network.
    - `update_cosine`, `innovation_cosine`: only if the algorithm returns them;
      the second needs two answers. If it is low, a warning is printed.

  Raises:
    ValueError: if the network selects more clients than there are, clients are
      not sampled as `privacy` assumes, `algorithm` adds less noise than
      `privacy` promises, or `algorithm` has another placement than `task`.
  """
  links = network or networks.IDEAL
  compatibility.check(task, algorithm, schedule, links, privacy)
  sample = cohorts.cohort_sampler(
    task.population,
    clients_per_round=links.selected(schedule.clients_per_round),
    batch_size=schedule.batch_size,
    local_epochs=schedule.local_epochs,
    local_steps=schedule.local_steps,
    sampling=schedule.sampling,
    seed=task.seed,
  )
  key = draws.key(task.seed)
  placement = task.placement.everywhere
  examples = jax.device_put(task.population.examples, placement)
  compiled = jax.jit(
    algorithm.round, donate_argnums=0, out_shardings=(placement, None)
  )
  evaluate, export = _results(task, algorithm, privacy, key)
  gate = codec_gate.Gate(tqdm.tqdm.write)

  def program(state):
    arguments = (state, task.frozen, examples, sample(0), key)
    settings: dict[str, Any] = dataclasses.asdict(schedule)
    settings.pop("rounds")  # A resumed run may have more.
    return {
      "round": programs.of_function(compiled, *arguments),
      "start": programs.of_arrays(state),
      "rows": programs.of_arrays((examples, task.population.starts)),
      "seed": task.seed,
      **settings,
      "network": network and network.describe(len(task.population.names)),
      "privacy": privacy and repr(privacy),
    }

  def advance(state, cohort):
    state, metrics = compiled(state, task.frozen, examples, cohort, key)
    return state, jax.device_get(metrics)

  def round_fn(state, number):
    cohort = sample(number)
    # A Poisson round waits for all of its clients, whatever their number.
    is_poisson = schedule.sampling == "poisson"
    wanted = len(cohort.clients) if is_poisson else schedule.clients_per_round
    state, metrics, outcome, seconds = links.round(
      advance, state, cohort, round_number=number, wanted=wanted
    )
    diverged = outcome.answered & ~metrics["finite"]
    _check_finite(task, number, cohort.clients[diverged], state)
    line: dict[str, Any] = outcome.sent(metrics, _trained_entries(state))
    line["tokens"] = metrics["tokens"]
    if outcome.answered.any():
      line |= _means(metrics, outcome.answered.sum())
      gate.see(line.get("innovation_cosine"))
    else:
      _say_empty(number, outcome, algorithm)
    if observe:
      observe(number, outcome.cohort(cohort), metrics)
    if network:
      line["selected"] = outcome.selected.sum()
      line["answered"] = outcome.answered.sum()
      line["simulated_seconds"] = seconds
    return state, line

  return runner.Experiment(
    rounds=schedule.rounds,
    init=lambda: jax.device_put(algorithm.init(task.trainable), placement),
    round=round_fn,
    evaluate=evaluate,
    export=export,
    data=task.data,
    program=program,
    population=task.population,
    evaluate_every=schedule.evaluate_every,
    checkpoint_every=schedule.checkpoint_every,
  )


def _check_finite(task, number, diverged, state):
  """Stops a run before values that are not finite are saved."""
  if diverged.size:
    names = ", ".join(task.population.names[client] for client in diverged)
    problem = f"the update of {names} is not finite and was not sent"
    rate = "the clients' learning rate"
  elif not _is_finite(state.trainable):
    problem = "the server's parameters are not finite after its step"
    rate = "the server's learning rate, or look at the aggregator"
  else:
    return
  raise FloatingPointError(
    f"round {number + 1}: {problem}. The round is not saved. Start again in"
    f" another folder (--out), and lower {rate}."
  )


@jax.jit
def _is_finite(tree):
  leaves = jax.tree.leaves(tree)
  return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def _means(metrics, answered):
  """Returns the metrics that need the answer of a client."""
  names = ["train_loss", "update_cosine"]
  if answered > 1:
    names.append("innovation_cosine")  # One client has none.
  return {name: metrics[name] for name in names if name in metrics}


def _say_empty(number, outcome, algorithm):
  # A private server steps on noise alone, so it does not show empty cohorts.
  is_noisy = algorithm.noise_multiplier is not None
  tqdm.tqdm.write(
    f"round {number + 1}: none of {outcome.selected.sum()} selected clients"
    f" answered; {'there is only noise' if is_noisy else 'it is skipped'}."
  )


def _trained_entries(state: Any) -> int:
  """Returns how many numbers the method trains, which may not be all."""
  while hasattr(state, "inner"):
    state = state.inner
  return sum(x.size for x in jax.tree.leaves(state.trainable))


def _results(task, algorithm, privacy, key):
  """Makes the functions that evaluate and export a state."""
  received = jax.jit(algorithm.received)
  residual_of = algorithm.residual or (lambda state: None)

  def evaluate(state):
    sent, kept = received(state, key), state.trainable
    residual = residual_of(state)
    frozen = (
      task.frozen if residual is None else lora.add(task.frozen, residual)
    )
    result = task.evaluate(sent, frozen)
    same = jax.tree.all(jax.tree.map(np.array_equal, sent, kept))
    server = result if same else task.evaluate(kept, frozen)
    result |= {f"server_{name}": x for name, x in server.items()}
    done = int(state.round)
    if privacy and done and math.isfinite(privacy.epsilon(done)):
      result["epsilon"] = privacy.epsilon(done)
    return result

  def export(state, folder):
    trained, residual = received(state, key), residual_of(state)
    task.save_adapter(trained, folder / "adapter", residual=residual)
    if privacy:
      described = privacy.describe(int(state.round))
      print(described)
      (folder / "privacy.txt").write_text(described + "\n")

  return evaluate, export
