"""What the clients of a round have, each for itself and not the mean.

For servers that combine clients in other ways than by adding up their updates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from fedjax_llm.federated import channels, clients, draws, fidelity, rounds


class Answers(NamedTuple):
  """What a cohort has after its training, as it arrives at the server.

  Attributes:
    trained: parameters [cohort, ...]; zeros for a client that is left out.
    weights: [cohort]; zero for a client that is left out.
    memory: of the cohort; as it was for a client that is left out.
    metrics: of the round, but for its downloads.
  """

  trained: Any
  weights: Any
  memory: Any
  metrics: Any


def gather(
  local_update: Callable[..., clients.Training],
  answer: Callable[..., tuple[Any, clients.Training, channels.Message]],
  *,
  placement: clients.Placement | None = None,
) -> Callable[..., Answers]:
  """Makes the part of a round that happens at the clients.

  Memory grows with the cohort by what is trained, not by the base model.

  Args:
    local_update: see `clients.local_update`.
    answer: `(shared, train, client, memory, key) -> (start, Training,
      Message)`, of one client: its start as a vector, what `train(start,
      frozen)` returns, and the message with the update.
    placement: see `clients.Placement`; all devices if not given.

  Returns:
    `fn(trainable, round, shared, memory, examples, cohort, key) -> Answers`,
    with the memory of the cohort.
  """

  def at_client(shared, client):
    trainable, number, inner, examples, key = shared
    cohort, memory = client
    _, unravel = ravel_pytree(trainable)

    def train(start, frozen):
      return local_update(
        unravel(start),
        frozen,
        examples,
        cohort.indices,
        cohort.mask,
        draws.stream(key, draws.Purpose.TRAIN, number, cohort.clients),
      )

    upload_key = draws.stream(key, draws.Purpose.UPLOAD, number, cohort.clients)
    start, training, message = answer(
      inner, train, cohort.clients, memory, upload_key
    )
    trained, _ = ravel_pytree(training.trainable)
    # Of both: a compressor may lose what is not finite, or overflow.
    finite = jnp.isfinite(trained).all() & jnp.isfinite(message.received).all()
    weight = jnp.where(finite, cohort.weights, 0).astype(start.dtype)
    keep = lambda new, old: jnp.where(weight > 0, new, old)
    arrived = jnp.where(weight > 0, start - message.received, 0)
    sums = fidelity.share(start - trained, message.received, weight)
    return (training.loss, training.count, sums), (
      arrived,
      weight,
      jax.tree.map(keep, message.memory, memory),
      {
        "upload_bytes": message.nbytes,
        "upload_entries": message.entries,
        "finite": finite,
      },
    )

  answers = clients.map_clients(at_client, placement=placement)

  def fn(trainable, number, shared, memory, examples, cohort, key):
    (loss, count, sums), outputs = answers(
      (trainable, number, shared, examples, key), (cohort, memory)
    )
    # All devices get all answers at once, and the server's part is the same
    # on each. Else it would be cut in pieces that wait for each other.
    arrived, weights, memory, metrics = rounds.replicate(outputs, placement)
    _, unravel = ravel_pytree(trainable)
    metrics |= {"train_loss": loss / jnp.maximum(count, 1), "tokens": count}
    metrics |= fidelity.cosines(sums)
    return Answers(jax.vmap(unravel)(arrived), weights, memory, metrics)

  return fn


def normalised(weights: Float[Array, " clients"]) -> Float[Array, " clients"]:
  """The weights over their sum; zeros if that is zero."""
  return weights / jnp.where(weights.sum() > 0, weights.sum(), 1)


def mean(trees: Any, weights: Float[Array, " clients"]) -> Any:
  """The sum of trees [clients, ...], weighted by `weights` that sum to one."""
  return jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), trees)
