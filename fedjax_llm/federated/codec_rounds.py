"""Rounds whose uploads go through a codec that is in their state.

A codec is any tree of arrays that both ends agreed on, such as one of `codecs`,
and a function makes the compressor of it: so fitting it anew compiles nothing,
and a large one is no constant of the program. Here too is who holds the encoder
already, and what the server has to fit a new one on.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base, wire
from fedjax_llm.federated import channels, clients, rounds

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
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """An algorithm whose uploads a codec compresses; its state is `CodecState`.

  A client fetches the encoder on its first visit, and again when there is a new
  one: that is in its `download_bytes`. The decoder stays at the server.

  Args:
    compose: upload compressor -> algorithm, whose state has `upload`.
    codec: the first codec.
    compressor_of: codec, traced -> its compressor: `autoencoder.autoencoder`
      or `pca.pca`; in a `base.chain`, under `base.error_feedback` as you like.
    setup_bytes: length of the message that tells a client the encoder.
    population: number of clients.
    volunteers: bool [population], clients that send what goes into the codec
      beside its latent, entry by entry, for `known`; that is in their
      `upload_bytes`. None if the codec is never fitted anew: then the server
      keeps nothing of clients.
    placement: that of the algorithm.

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
      (memory,) = state.upload
      memory = memory._replace(volunteers=jnp.array(volunteers, bool))
      state = state._replace(upload=(memory,))
    # Copied, so that donating the state leaves the caller's arrays alone.
    copy = jax.tree.map(jnp.array, codec)
    held = jnp.zeros(population, jnp.int32)
    return rounds.replicate(
      CodecState(state, copy, jnp.int32(1), held), placement
    )

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
      (memory,) = after.upload
      vector, _ = ravel_pytree(state.trainable)
      dense = wire.nbytes(base.Dense(vector))
      raw = jnp.where(memory.volunteers[cohort.clients], dense, 0)
      metrics |= {"upload_bytes": metrics["upload_bytes"] + raw}
    held = state.held.at[cohort.clients].set(new)
    after = state._replace(inner=after, held=held)
    return rounds.replicate(after, placement), metrics

  def received(state, key):
    return first.received(state.inner, key)

  residual_of = first.residual
  return rounds.FederatedAlgorithm(
    init,
    round_fn,
    received,
    residual=residual_of and (lambda state: residual_of(state.inner)),
    noise_multiplier=first.noise_multiplier,
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
  described = lambda tree: (
    jax.tree.structure(tree),
    [np.shape(leaf) for leaf in jax.tree.leaves(tree)],
  )
  if described(codec) != described(state.codec):
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
