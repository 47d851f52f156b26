"""Pruned adapters: clients hold the largest weights, and train nothing else.

Both methods are pruning of adapters in one place, brought to LoRA and many
clients as FLASC's authors did for comparison: the server stays dense, sends the
Top-K of its parameters, and clients train and answer with these alone.
Clients have no memory, so the support travels down with the values; up, values
travel alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.compression import base, segments, sparse, wire
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  densities,
  rounds,
  schedules,
)
from fedjax_llm.federated.algorithms import fed_avg, federated_select


def sparse_adapter(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  density: float,
  top_k: sparse.TopK = sparse.top_k,
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """SparseAdapter (He et al., 2022, arXiv 2210.04284): pruned once, for ever.

  The first round is dense both ways, or else `b`, which is zero before it,
  would be pruned whole. The Top-K of what it leaves is all that is sent and
  trained from then on. The server's other parameters may move on by the
  momentum and the decay of its optimizer, but nobody reads them: evaluate
  `received`.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    density: share of the parameters that is kept, in (0, 1].
    top_k: from a density to what sends the largest parameters; see
      `federated_select`.
    **parts: `aggregate` (the uniform mean unless told otherwise), `population`,
      `placement` of `rounds.federated_round`.

  Raises:
    ValueError: if `density` is out of range.
  """
  parts = {"aggregate": aggregators.uniform_mean()} | parts
  pruned = _first_top_k(top_k(density))
  # In the dense round nothing is chosen, but its state is that of the others.
  dense = base.Compressor(
    init=pruned.init,
    encode=lambda vector, state, key: (base.Dense(vector), state),
    decode=base.identity().decode,
  )
  stages = {
    0: channels.Channel(download=dense),
    1: federated_select.received_alone(pruned),
  }
  return schedules.staged(
    {
      begin: fed_avg.fed_avg(
        loss_fn, client_optimizer, server_optimizer, channel=channel, **parts
      )
      for begin, channel in stages.items()
    }
  )


def adapter_lth(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  density: densities.Density,
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """Adapter-LTH (Wu and Chen, 2022): pruned further and further.

  It is Federated Select with a density that falls from 1, for instance
  `densities.decaying(1.0, 0.9, every=10, rounds=200, floor=1 / 16)`. As in the
  code of FLASC's authors, nothing is rewound to where it started, and what was
  pruned may come back, because the server keeps all parameters and chooses
  anew every round.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: starts afresh at every client in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    density: shares of the parameters that are sent, in (0, 1], by the round
      they begin with.
    **parts: `top_k` of `federated_select`; `aggregate` (the uniform mean unless
      told otherwise), `population`, `placement` of `rounds.federated_round`.

  Raises:
    ValueError: if a density is out of range.
  """
  return federated_select.federated_select(
    loss_fn,
    client_optimizer,
    server_optimizer,
    density=density,
    warm_up_rounds=0,
    **parts,
  )


def _first_top_k(top_k: base.Compressor) -> base.Compressor:
  """Sends the entries that are the Top-K of the first vector, of all vectors.

  Its state is whether they are chosen, and which they are.
  """

  def init(vector):
    return jnp.bool(False), jnp.zeros(vector.shape, bool)

  def encode(vector, state, key):
    is_chosen, mask = state
    choose = lambda: top_k.encode(vector, (), key)[0]
    count = wire.entries(jax.eval_shape(choose))
    mask = jax.lax.cond(
      is_chosen, lambda: mask, lambda: sparse.support(choose())
    )
    send = lambda values: segments.send_mask(mask, count).encode(
      values, (), key
    )[0]
    # What arrives of zeros: `top_k` may send how much has moved since the seed.
    known = top_k.decode(send(jnp.zeros_like(vector)))
    return send(vector - known), (jnp.bool(True), mask)

  return base.Compressor(init, encode, top_k.decode)
