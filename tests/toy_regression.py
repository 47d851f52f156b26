"""Linear regression at six clients: a task that costs nothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm.compression import base, sparse
from fedjax_llm.data import batches, cohorts
from fedjax_llm.experiments import finetuning, tasks
from fedjax_llm.federated import channels, clients, rounds
from fedjax_llm.federated.algorithms import fed_avg
from fedjax_llm.federated.privacy import mechanisms


class Toy(NamedTuple):
  """Linear regression at 6 clients of 1 to 6 examples, as a task."""

  task: tasks.Task
  algorithm: rounds.FederatedAlgorithm

  def experiment(self, *, network=None, privacy=None, **options):
    schedule = finetuning.Schedule(**SETTINGS | {"rounds": 4} | options)
    return finetuning.fine_tuning(
      self.task, self.algorithm, schedule, network=network, privacy=privacy
    )

  def private(self, make, noise_multiplier, **knobs):
    """The toy with an algorithm that has a private mean."""
    aggregate = mechanisms.private_mean(
      clip_norm=1.0, noise_multiplier=noise_multiplier, clients=4
    )
    optimizers = optax.sgd(0.1), optax.sgd(1.0)
    algorithm = make(
      self.task.loss_fn, *optimizers, aggregate=aggregate, **knobs
    )
    return self._replace(algorithm=algorithm)

  def sampler(self, **options):
    options = {**SETTINGS, "seed": self.task.seed} | options
    return cohorts.cohort_sampler(self.task.population, **options)


SETTINGS = {"clients_per_round": 4, "batch_size": 2}


def made() -> Toy:
  """Makes the toy, whose clients send half of their updates."""
  rng = np.random.default_rng(0)
  examples = {"x": rng.normal(size=(21, 8)), "y": rng.normal(size=21)}
  examples = jax.tree.map(np.float32, examples)
  starts = np.cumsum([0, 1, 2, 3, 4, 5, 6])

  def loss_fn(trainable, frozen, examples, mask, key):
    del key  # Deterministic.
    errors = (
      examples["x"] @ (trainable["w"] + frozen["w"]["kernel"]) - examples["y"]
    )
    return jnp.where(mask, errors**2, 0).sum(), mask.sum()

  def evaluate(trainable, frozen):
    everyone = np.ones(21, bool)
    total, count = loss_fn(trainable, frozen, examples, everyone, None)
    return {"loss": float(total / count)}

  def save_adapter(trainable, folder, residual=None):
    folder.mkdir(exist_ok=True)
    moved = 0 if residual is None else residual["w"]["delta"]
    np.save(folder / "w.npy", trainable["w"] + moved)

  task = tasks.Task(
    loss_fn=loss_fn,
    trainable={"w": jnp.zeros(8)},
    frozen={"w": {"kernel": jnp.ones(8)}},
    population=batches.Population(tuple("abcdef"), examples, starts),
    evaluate=evaluate,
    save_adapter=save_adapter,
    placement=clients.Placement(),
    seed=0,
    data={},
  )
  half = base.error_feedback(sparse.top_k(0.5))
  algorithm = fed_avg.fed_avg(
    loss_fn,
    optax.sgd(0.1),
    optax.sgd(1.0),
    channel=channels.Channel(upload=half),
    population=6,
    placement=task.placement,
  )
  return Toy(task, algorithm)
