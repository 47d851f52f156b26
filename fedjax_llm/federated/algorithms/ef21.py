"""EF21: error feedback that sends how a client's update has changed.

Richtárik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and
Practically Faster Error Feedback", 2021 (arXiv 2106.05203), with partial
participation as in Fatkhullin et al., "EF21 with Bells & Whistles", 2021 (arXiv
2110.03294). A client keeps g_i, the server's estimate of its update. It sends
C(update - g_i). The client adds it to g_i, the server adds it to the mean of
all clients' g_i. The server steps on this mean. If updates converge, the g_i
converge to them: nothing is lost.
"""

import dataclasses

import jax.numpy as jnp
import optax

from fedjax_llm.compression import base
from fedjax_llm.federated import aggregators, channels, clients, rounds


def ef21(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  population: int,
  upload: base.Compressor,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Federated averaging of the server's estimates of all clients' updates.

  A client's update takes the place of the paper's gradient; its g_i is zero
  before its first round. Every client counts once, as in the paper. The mean is
  over all clients, so it is small while only a few have taken part. An old g_i
  may be far from the client's present update.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the mean of all g_i; the paper's is `optax.sgd`.
    population: the number of clients.
    upload: the paper's C, a contraction such as `top_k`. With a compressor that
      is only unbiased the g_i may grow.
    placement: see `clients.Placement`; all devices if not given.

  Returns:
    The algorithm, whose upload state is (g_i, state of `upload`). Its rounds
    never measure cosines: what arrives is the change of an update.
  """
  placement = placement or clients.Placement()
  algorithm = rounds.federated_round(
    clients.local_update(loss_fn, client_optimizer),
    # With a decay of 1 the trace is the sum of all increments: the mean g_i.
    optax.chain(optax.trace(1.0), server_optimizer),
    channel=channels.Channel(upload=increments(upload)),
    aggregate=_share_of_all(population),
    population=population,
    placement=dataclasses.replace(placement, cosines=False),
  )
  return algorithm._replace(placement=placement)


def increments(compressor: base.Compressor) -> base.Compressor:
  """Sends the difference between a vector and the sum of what arrived before.

  The decoded vector is an increment; the receiver must add up the increments.

  Args:
    compressor: compresses the difference.

  Returns:
    A `Compressor` with state (sum of what arrived, state of `compressor`).
  """

  def init(vector):
    return jnp.zeros_like(vector), compressor.init(vector)

  def encode(vector, state, key):
    known, inner = state
    received, inner, payload = base.transmit(
      compressor, vector - known, inner, key
    )
    return payload, (known + received, inner)

  return compressor._replace(init=init, encode=encode)


def _share_of_all(population: int) -> aggregators.Aggregator:
  """Makes the sum over the clients that took part, over the population."""
  return aggregators.sum_updates()._replace(
    finish=lambda total, state, key: (total / population, state)
  )
