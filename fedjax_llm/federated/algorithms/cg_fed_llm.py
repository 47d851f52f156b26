"""CG-FedLLM: a learned codec in the upload, and where its bytes are counted.

Wu et al., "CG-FedLLM: How to Compress Gradients in Federated Fine-tuning for
Large Language Models", 2024 (arXiv 2405.13746). Its fine-tuning stage, FAF, is
federated averaging of LoRA factors whose upload is an autoencoder's latent:

  FAF            `cg_fed_llm(..., codec=codec, compressor_of=autoencoder)`
  literal sum    the same with `aggregate=aggregators.total()`: Algorithm 1 has
                 a sum where the code it builds on, Shepherd, has a mean
  product space  `cg_fed_llm_products`: Algorithm 1 names the products B A

The paper does not say whether a client sends its adapter or its update: that
is the `representation`. A codec is any tree of arrays here, such as one of
`codecs`, and part of the state: fitting it anew compiles nothing.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import channels, clients, product_rounds, rounds
from fedjax_llm.federated.algorithms import flex_lora

Representation = Literal["delta", "state"]


class CodecState(NamedTuple):
  """The state of rounds with a codec.

  Attributes:
    inner: of the algorithm that the codec compresses the uploads of.
    codec: what both ends agreed on.
    version: int32, how often there was a new one.
    held: int32 [population], which version each client has; 0 for none.
  """

  inner: Any
  codec: Any
  version: Any
  held: Any

  @property
  def round(self) -> Any:
    """How many rounds are done."""
    return self.inner.round

  @property
  def trainable(self) -> Any:
    """The server's parameters."""
    return self.inner.trainable


class Known(NamedTuple):
  """What the server has of a client: a state of `remembered`.

  Attributes:
    vector: the last that went into the codec, if the client volunteers it;
      else what was decoded. Zeros before the first.
    volunteers: bool, whether it does.
    inner: state of the compressor.
  """

  vector: Any
  volunteers: Any
  inner: Any


def cg_fed_llm(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  codec: Any,
  compressor_of: Callable[[Any], base.Compressor],
  setup_bytes: int,
  population: int,
  representation: Representation = "delta",
  volunteers: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  **parts: Any,
) -> rounds.FederatedAlgorithm:
  """FAF: what arrives is averaged, `a` and `b` each by itself.

  A client fetches the encoder on its first visit, and again when there is a new
  one: that is in its `download_bytes`. The decoder stays at the server.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: Shepherd's is AdamW, afresh in every round.
    server_optimizer: the paper's step of eta is `optax.sgd(eta)`; 1 replaces
      the adapter by the mean.
    codec: tree of arrays, the first codec.
    compressor_of: codec, traced -> the compressor, such as
      `autoencoder.autoencoder` or `pca.pca`; or of these a `base.chain`, or
      under `base.error_feedback`.
    setup_bytes: length of the message that tells a client the encoder.
    population: number of clients.
    representation: what goes through the codec: "delta", the update, which is
      received minus trained; or "state", the trained adapter itself. The server
      adds up updates in either case: the sum of K whole adapters would grow K
      times a round even if nobody trained.
    volunteers: bool [population], clients that send what went into the codec
      beside its latent, entry by entry, for `known`; that is in their
      `upload_bytes`. None if the codec is never fitted anew: then the server
      keeps nothing of clients.
    mesh: see `rounds.federated_round`.
    **parts: `aggregate`, `clients_per_step` of `rounds.federated_round`.

  Raises:
    ValueError: if `representation` is neither, or `volunteers` are not of the
      population.
  """
  local_update = clients.local_update(loss_fn, client_optimizer)

  def compose(compressor):
    return rounds.federated_round(
      local_update,
      server_optimizer,
      channel=channel(compressor, representation),
      population=population,
      mesh=mesh,
      **parts,
    )

  return with_codec(
    compose,
    codec=codec,
    compressor_of=compressor_of,
    setup_bytes=setup_bytes,
    population=population,
    volunteers=volunteers,
    mesh=mesh,
  )


def cg_fed_llm_products(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  *,
  codec: Any,
  compressor_of: Callable[[Any], base.Compressor],
  setup_bytes: int,
  population: int,
  representation: Representation = "delta",
  volunteers: Any = None,
  clients_per_step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> rounds.FederatedAlgorithm:
  """FAF whose server averages the products of what it decodes.

  Their mean is decomposed to factors of the adapter's rank as FlexLoRA does, so
  that there is no residual. Arguments are those of `cg_fed_llm`, but there is
  no server optimizer, and of its parts only `clients_per_step` and `mesh`.
  """
  local_update = clients.local_update(loss_fn, client_optimizer)

  def compose(compressor):
    tiers = channels.tiers_of(channel(compressor, representation))
    return product_rounds.product_round(
      local_update,
      flex_lora.nearest_products,
      lambda trainable: tiers,
      population=population,
      clients_per_step=clients_per_step,
      mesh=mesh,
    )

  return with_codec(
    compose,
    codec=codec,
    compressor_of=compressor_of,
    setup_bytes=setup_bytes,
    population=population,
    volunteers=volunteers,
    mesh=mesh,
  )


def channel(
  compressor: base.Compressor, representation: Representation = "delta"
) -> channels.Channel:
  """Uploads by `compressor`, of the update or of the trained adapter.

  Raises:
    ValueError: if `representation` is neither "delta" nor "state".
  """
  if representation not in ("delta", "state"):
    raise ValueError(
      f"expected representation 'delta' or 'state', got {representation!r}."
    )
  if representation == "delta":
    return channels.Channel(upload=compressor)

  def upload(payload):
    # What the client received, which it trained from, both ends know.
    start = payload.values
    return base.Compressor(
      init=compressor.init,
      encode=lambda update, state, key: compressor.encode(
        start - update, state, key
      ),
      decode=lambda latent: start - compressor.decode(latent),
    )

  return channels.Channel(upload=upload)


def remembered(compressor: base.Compressor) -> base.Compressor:
  """A compressor whose state is `Known`, for a server that records."""

  def init(vector):
    none = jnp.zeros(vector.shape, vector.dtype)
    return Known(none, jnp.zeros((), bool), compressor.init(vector))

  def encode(vector, state, key):
    received, inner, payload = base.transmit(
      compressor, vector, state.inner, key
    )
    seen = jnp.where(state.volunteers, vector, received)
    return payload, state._replace(vector=seen, inner=inner)

  return base.Compressor(init, encode, compressor.decode)


def with_codec(
  compose: Callable[[base.Compressor], rounds.FederatedAlgorithm],
  *,
  codec: Any,
  compressor_of: Callable[[Any], base.Compressor],
  setup_bytes: int,
  population: int,
  volunteers: Any = None,
  mesh: jax.sharding.Mesh | None = None,
) -> rounds.FederatedAlgorithm:
  """An algorithm with a codec in its state, see `cg_fed_llm`.

  Args:
    compose: upload compressor -> algorithm, whose state has `upload`.
    codec: as in `cg_fed_llm`.
    compressor_of: as in `cg_fed_llm`.
    setup_bytes: as in `cg_fed_llm`.
    population: as in `cg_fed_llm`.
    volunteers: as in `cg_fed_llm`.
    mesh: that of the algorithm.

  Raises:
    ValueError: if `volunteers` are not of the population, or `compose` does.
  """
  if volunteers is not None and np.shape(volunteers) != (population,):
    raise ValueError(
      f"expected volunteers, bool [{population}], one for each client, got"
      f" shape {np.shape(volunteers)}."
    )

  def inner(codec):
    compressor = compressor_of(codec)
    return compose(compressor if volunteers is None else remembered(compressor))

  first = inner(codec)

  def init(trainable):
    state = first.init(trainable)
    if volunteers is not None:
      # A copy of the state's is not a constant, which must not be donated.
      (known,) = state.upload
      willing = known.volunteers | jnp.asarray(volunteers, bool)
      state = state._replace(upload=(known._replace(volunteers=willing),))
    # Copied, so that donating the state leaves the caller's arrays alone.
    copy, none = (
      jax.tree.map(jnp.array, codec),
      jnp.zeros(population, jnp.int32),
    )
    return rounds.replicate(CodecState(state, copy, jnp.int32(1), none), mesh)

  def round_fn(state, frozen, examples, cohort, key):
    after, metrics = inner(state.codec).round(
      state.inner, frozen, examples, cohort, key
    )
    old = state.held[cohort.clients]
    present = (cohort.weights > 0) & metrics["finite"]
    new = jnp.where(present, state.version, old)
    setup = jnp.where(old < state.version, setup_bytes, 0)
    metrics = metrics | {"download_bytes": metrics["download_bytes"] + setup}
    if volunteers is not None:
      (known,) = after.upload
      vector, _ = ravel_pytree(state.trainable)
      raw = jnp.where(
        known.volunteers[cohort.clients], wire.nbytes(base.Dense(vector)), 0
      )
      metrics |= {"upload_bytes": metrics["upload_bytes"] + raw}
    held = state.held.at[cohort.clients].set(new)
    after = state._replace(inner=after, held=held)
    return rounds.replicate(after, mesh), metrics

  def received(state, key):
    return first.received(state.inner, key)

  return rounds.FederatedAlgorithm(
    init, round_fn, received, noise_multiplier=first.noise_multiplier
  )


def known(state: CodecState) -> np.ndarray:
  """What the server has of clients, to fit a codec on: [count, n].

  Of each that has come the last vector, in the order of their numbers: what
  went into the codec, of `volunteers`, or else what was decoded.

  Raises:
    ValueError: if the codec is never fitted anew.
  """
  upload = state.inner.upload[0]
  if not isinstance(upload, Known):
    raise ValueError(
      "known expected rounds with `volunteers`; without them the server keeps"
      " nothing of clients."
    )
  return np.asarray(upload.vector)[np.asarray(state.held) > 0]


def refitted(state: CodecState, codec: Any) -> CodecState:
  """The state with a new codec, whose encoder clients fetch as they come.

  Args:
    state: of rounds.
    codec: with arrays of the shapes of the old one's.

  Raises:
    ValueError: if the shapes differ.
  """
  shapes = lambda tree: jax.tree.map(np.shape, tree)
  if shapes(codec) != shapes(state.codec):
    raise ValueError(
      "refitted expected a codec of the same shapes, which the rounds are"
      " compiled for. Fit the same network, or as many components."
    )
  place = lambda new, old: jax.device_put(
    np.asarray(new, old.dtype), old.sharding
  )
  return state._replace(
    codec=jax.tree.map(place, codec, state.codec), version=state.version + 1
  )
