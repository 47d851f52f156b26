"""EF21: error feedback that sends how a client's update has changed.

Richtárik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and
Practically Faster Error Feedback", 2021 (arXiv 2106.05203); clients that are
not there change nothing, as in Fatkhullin et al., "EF21 with Bells & Whistles",
2021 (arXiv 2110.03294). A client keeps g_i, what the server takes its update
for. Up travels C(update - g_i), which is added to g_i, and at the server to the
mean of all g_i, also of those who are not there; on this mean it steps. If
updates settle, the g_i settle at the updates: nothing is lost.
"""

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
  """Federated averaging of the updates that the server knows of all clients.

  Where the paper has a gradient, here is the update of a client, whose g_i is
  zero before its first round. Clients count alike, as in the paper, whatever
  their weights. While only few clients have been there, the mean over all is
  small; and the older a g_i, the less it says.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean of all g_i; the paper's is `optax.sgd`.
    population: number of clients.
    upload: C of the paper, a contraction such as `top_k`: what is unbiased only
      may let the g_i grow.
    placement: see `clients.Placement`; all devices if not given.

  Returns:
    The algorithm, whose upload state is (g_i, state of `upload`). Its rounds
    tell no cosines: what arrives is no update, but the change of one.
  """
  algorithm = rounds.federated_round(
    clients.local_update(loss_fn, client_optimizer),
    # With a decay of one the trace is the sum of all that came: the mean g_i.
    optax.chain(optax.trace(1.0), server_optimizer),
    channel=channels.Channel(upload=increments(upload)),
    aggregate=_share_of_all(population),
    population=population,
    placement=placement,
  )

  def round_fn(*arguments):
    state, metrics = algorithm.round(*arguments)
    return state, {x: y for x, y in metrics.items() if "cosine" not in x}

  return algorithm._replace(round=round_fn)


def increments(compressor: base.Compressor) -> base.Compressor:
  """Sends how a vector differs from the sum of all that arrived before.

  What is decoded is the increment, for a receiver that adds up.

  Args:
    compressor: of the difference.

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

  return base.Compressor(init, encode, compressor.decode)


def _share_of_all(population: int) -> aggregators.Aggregator:
  """The sum over the clients that are there, divided by how many there are."""

  def share(update, weight, state):
    del state
    return jnp.where(weight > 0, update, 0)

  def finish(total, state, key):
    del key  # Deterministic.
    return total / population, state

  return aggregators.Aggregator(lambda: (), share, finish)
