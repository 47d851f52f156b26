"""Pruned adapters: clients receive and train only the largest parameters.

Both methods were made to prune adapters on one machine. FLASC's authors adapted
them to federated LoRA for comparison: the server stays dense and sends the
Top-K of its parameters, and clients train and send only these. Clients have no
memory, so the support travels down with the values; only values travel up.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.compression import base, sparse, wire
from fedjax_llm.federated import (
  aggregators,
  channels,
  clients,
  densities,
  rounds,
)
from fedjax_llm.federated.algorithms import fed_avg, federated_select


def sparse_adapter(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  density: float,
  top_k: sparse.TopK = sparse.top_k,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """SparseAdapter (He et al., 2022, arXiv 2210.04284): pruned once, for ever.

  The first round is dense both ways. Otherwise all of `b` would be pruned,
  because it is zero before that round. From then on, clients receive and train
  only the entries in the Top-K after the first round. The server's other
  parameters may still change by the momentum and the decay of its optimizer,
  but they are not used: evaluate `received`.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    density: the share of the parameters that is kept, in (0, 1].
    top_k: see `federated_select`.
    aggregate: turns the clients' updates into one; if not given, their mean,
      with equal weights.
    population: the number of clients, if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: if `density` is out of range.
  """
  pruned = _first_top_k(top_k(density))
  # The dense round chooses nothing, but has the state of the other rounds.
  dense = pruned._replace(
    encode=lambda vector, state, key: (base.Dense(vector), state),
    decode=base.identity().decode,
  )
  return fed_avg.fed_avg(
    loss_fn,
    client_optimizer,
    server_optimizer,
    channel={
      0: channels.Channel(download=dense),
      1: federated_select.received_alone(pruned),
    },
    aggregate=aggregate or aggregators.uniform_mean(),
    population=population,
    placement=placement,
  )


def adapter_lth(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  density: densities.Density,
  top_k: sparse.TopK = sparse.top_k,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Adapter-LTH (Wu and Chen, 2022): pruned more and more over the rounds.

  It is Federated Select with a density that falls from 1, for instance
  `densities.decaying(1.0, 0.9, every=10, rounds=200, floor=1 / 16)`. As in the
  code of FLASC's authors, no parameter is rewound to its start, and what was
  pruned may come back, because the server keeps all parameters and chooses
  again every round.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer; its state is new in every round.
    server_optimizer: steps on the mean update; FLASC's authors use
      `flasc.server_adamw`.
    density: the share of the parameters that is sent, in (0, 1]; or a mapping
      from rounds to the shares that begin there.
    top_k: see `federated_select`.
    aggregate: turns the clients' updates into one; if not given, their mean,
      with equal weights.
    population: as in `flasc`.
    placement: as in `flasc`.

  Raises:
    ValueError: if a density is out of range.
  """
  return federated_select.federated_select(
    loss_fn,
    client_optimizer,
    server_optimizer,
    density=density,
    warm_up_rounds=0,
    top_k=top_k,
    aggregate=aggregate,
    population=population,
    placement=placement,
  )


def _first_top_k(top_k: base.Compressor) -> base.Compressor:
  """Sends, from every vector, the entries in the Top-K of the first vector.

  The state is whether these have been chosen, and a mask of them.
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
    send = lambda values: sparse.gather(values, mask, count)
    # Zeros may decode to other values: `top_k` may send changes since the seed.
    known = top_k.decode(send(jnp.zeros_like(vector)))
    return send(vector - known), (jnp.bool(True), mask)

  return top_k._replace(init=init, encode=encode)
