"""What does not fit together, or breaks a promise, is refused in words."""

import optax
import pytest

from fedjax_llm.compression import base, sparse
from fedjax_llm.experiments import finetuning
from fedjax_llm.federated import channels, network, parameters, rounds
from fedjax_llm.federated.algorithms import (
  delta_downloads,
  fed_avg,
  flasc,
  scaffold,
)
from fedjax_llm.federated.privacy import dp_sgd, guarantees
from tests import placements, toy_regression


@pytest.fixture(scope="module")
def toy():
  return toy_regression.made()


def test_sampling_that_privacy_is_not_accounted_for_is_refused(toy):
  guarantee = guarantees.ClientLevel(1.0, 1e-3, "fixed", 6, 3)
  with pytest.raises(ValueError, match="accounted for"):
    toy.private(fed_avg.fed_avg, 1.0).experiment(privacy=guarantee)


def fed_avg_of_w(loss_fn, *optimizers, aggregate):
  return parameters.partial(
    lambda of_w: fed_avg.fed_avg(of_w, *optimizers, aggregate=aggregate),
    loss_fn,
    is_trained=lambda path: path == "w",
  )


PRIVATE = (
  (fed_avg.fed_avg, {}),
  (flasc.flasc, {"download_density": {0: 0.5, 2: 1}, "upload_density": 0.5}),
  (fed_avg_of_w, {}),
  (delta_downloads.delta_downloads, {"population": 6}),
)


@pytest.mark.parametrize(("make", "knobs"), PRIVATE)
def test_privacy_needs_an_algorithm_with_its_noise(toy, make, knobs):
  guarantee = guarantees.ClientLevel(1.0, 1e-3, "fixed", 6, 4)
  toy.private(make, 1.0, **knobs).experiment(privacy=guarantee)
  for other in (toy.private(make, 0.5, **knobs), toy):
    message = "noise_multiplier=1.0, but .* noise_multiplier is (0.5|None)"
    with pytest.raises(ValueError, match=message):
      other.experiment(privacy=guarantee)


def test_an_algorithm_for_other_devices_is_refused(toy):
  algorithm = fed_avg.fed_avg(
    toy.task.loss_fn,
    optax.sgd(0.1),
    optax.sgd(1.0),
    placement=placements.on(1, 1),
  )
  with pytest.raises(ValueError, match="Make it with placement=task.placement"):
    toy._replace(algorithm=algorithm).experiment()


def by_example(toy, noise_multiplier):
  """The toy, trained by DP-SGD."""
  local_update = dp_sgd.local_update(
    toy.task.loss_fn,
    optax.sgd(0.1),
    clip_norm=1.0,
    noise_multiplier=noise_multiplier,
  )
  algorithm = rounds.federated_round(
    local_update, optax.sgd(1.0), placement=toy.task.placement
  )
  return toy._replace(algorithm=algorithm)


def test_privacy_of_examples_needs_noise_in_what_trains(toy):
  guarantee = guarantees.ExampleLevel(1.0, 1e-3)
  by_example(toy, 1.0).experiment(privacy=guarantee)
  # The noise of a mean is no noise in training, and too little is refused too.
  others = (
    toy,
    by_example(toy, 0.5),
    toy.private(fed_avg.fed_avg, 1.0),
  )
  for other in others:
    with pytest.raises(ValueError, match="ExampleLevel .*noise_multiplier=1.0"):
      other.experiment(privacy=guarantee)
  clients_level = guarantees.ClientLevel(1.0, 1e-3, "fixed", 6, 4)
  with pytest.raises(
    ValueError, match="ClientLevel .*noise_multiplier is None"
  ):
    by_example(toy, 1.0).experiment(privacy=clients_level)


def test_a_promise_that_cannot_be_checked_is_refused(toy):
  class Promise:
    """Says that it is private."""

    def check(self, *sampled):
      pass

  with pytest.raises(
    ValueError, match="whose noise can be checked, got a Prom"
  ):
    toy.experiment(privacy=Promise())


def test_over_selection_is_refused_where_it_has_no_meaning(toy):
  links = (network.Link(1.0, 1.0, 0.1, 0.1),)
  twice = network.Network(tiers=links, over_selection=1.5, seed=0)
  private = guarantees.ClientLevel(1.0, 1e-3, "fixed", 6, 4)
  for options in ({"sampling": "poisson"}, {"privacy": private}):
    with pytest.raises(ValueError, match="expected over_selection=1 with"):
      toy.experiment(network=twice, **options)
  with pytest.raises(ValueError, match="at most 6 clients, .* got 8"):
    toy.experiment(network=twice, clients_per_round=5)


def test_an_algorithm_remembers_as_many_clients_as_there_are(toy):
  # With fewer, some clients would share a memory; JAX does not notice.
  task = toy.task
  half = base.error_feedback(sparse.top_k(0.5))
  for population in (3, 9):
    for algorithm in (
      fed_avg.fed_avg(
        task.loss_fn,
        optax.sgd(0.1),
        optax.sgd(1.0),
        channel=channels.Channel(upload=half),
        population=population,
        placement=task.placement,
      ),
      scaffold.scaffold(
        task.loss_fn,
        0.1,
        optax.sgd(1.0),
        population=population,
        placement=task.placement,
      ),
    ):
      message = f"for the 6 clients of the task, got one for {population}"
      with pytest.raises(ValueError, match=message):
        toy._replace(algorithm=algorithm).experiment()


def test_arguments_in_another_order_are_refused(toy):
  schedule = finetuning.Schedule(1, 1, 1)
  message = r"\(task, algorithm, schedule\), got a FederatedAlgorithm as task"
  with pytest.raises(ValueError, match=message):
    finetuning.fine_tuning(toy.algorithm, toy.task, schedule)
