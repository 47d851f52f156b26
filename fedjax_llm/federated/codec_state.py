"""Rounds with a codec in their state.

A codec is a tree of arrays that both ends agree on; a function makes the
compressor from it. A codec in the state is not a constant of the program, so it
may be large, and a new one, fitted between rounds, needs no compilation. The
state also records which clients have the encoder, and the vectors that a new
codec can be fitted to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import base
from fedjax_llm.federated import channels, clients, parameters, rounds


class Coding(NamedTuple):
  """A codec, and how uploads are sent by it.

  Attributes:
    codec: what both ends agree on, a tree of arrays.
    compressor_of: function from the codec, traced, to its compressor, such as
      `autoencoder.autoencoder` or `pca.pca`; it may add a quantiser in a
      `base.chain`, or `base.error_feedback`.
    setup_bytes: length of the message that brings a client the encoder.
    signature: `parameters.signature` of the tree that the codec was fitted to;
      None if unknown. A codec of another tree is refused.
  """

  codec: Any
  compressor_of: Callable[[Any], base.Compressor]
  setup_bytes: int
  signature: str | None = None


class CodecState(NamedTuple):
  """The state of rounds with a codec.

  Attributes:
    inner: state of the algorithm whose uploads the codec compresses.
    codec: the current codec.
    version: number of the current codec, int32, from 1.
    held: version of the encoder that each client has, int32 [population]; 0 for
      none.
  """

  inner: Any
  codec: Any
  version: Any
  held: Any

  @property
  def round(self) -> Any:
    """The number of rounds that are done."""
    return self.inner.round

  @property
  def trainable(self) -> Any:
    """The server's parameters."""
    return self.inner.trainable


class Known(NamedTuple):
  """What the server knows about a client: the state of `remembered`.

  Attributes:
    vector: the last vector that went into the codec, if the client volunteers;
      else the last decoded vector. Zeros before the first upload.
    volunteers: whether the client volunteers, bool.
    inner: state of the compressor.
  """

  vector: Any
  volunteers: Any
  inner: Any


def remembered(compressor: base.Compressor) -> base.Compressor:
  """Returns the compressor with state `Known`, which has the last vector."""

  def init(vector):
    none = jnp.zeros(vector.shape, vector.dtype)
    return Known(none, jnp.zeros((), bool), compressor.init(vector))

  def encode(vector, state, key):
    received, inner, payload = base.transmit(
      compressor, vector, state.inner, key
    )
    seen = jnp.where(state.volunteers, vector, received)
    return payload, state._replace(vector=seen, inner=inner)

  return compressor._replace(init=init, encode=encode)


def with_codec(
  compose: Callable[[base.Compressor], rounds.FederatedAlgorithm],
  *,
  coding: Coding,
  population: int,
  volunteers: Any = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Makes an algorithm whose uploads a codec compresses.

  A client fetches the encoder in its first round, and again when there is a new
  one; its `download_bytes` include that. The decoder stays at the server.

  Args:
    compose: function from the upload compressor to the algorithm, whose state
      has `upload`.
    coding: the codec.
    population: number of clients.
    volunteers: bool [population], the clients that also send, uncompressed, the
      vector that goes into the codec, so that `known` has it. Their
      `upload_bytes` include it. None if the codec is never refitted; the server
      then keeps no vectors.
    placement: placement of the algorithm.

  Returns:
    An algorithm whose state is a `CodecState`. Its `init` raises a `ValueError`
    if the codec was fitted to another tree, or a message with it is too large.

  Raises:
    ValueError: if the length of `volunteers` is not `population`, or from
      `compose`.
  """
  if volunteers is not None and np.shape(volunteers) != (population,):
    raise ValueError(
      f"expected volunteers, bool [{population}], one for each client, got"
      f" shape {np.shape(volunteers)}."
    )

  def inner(codec):
    compressor = coding.compressor_of(codec)
    return compose(compressor if volunteers is None else remembered(compressor))

  first = inner(coding.codec)

  def init(trainable):
    if coding.signature not in (None, parameters.signature(trainable)):
      raise ValueError(
        "the codec was fitted to an adapter of other layers or shapes. Give the"
        " model, rank and targets that it was recorded with, or fit another."
      )
    whole = base.Dense(ravel_pytree(trainable)[0])
    channels.sizes(whole, setup_bytes=coding.setup_bytes)
    state = first.init(trainable)
    if volunteers is not None:
      channels.sizes(whole, whole)
      (memory,) = state.upload
      memory = memory._replace(volunteers=jnp.array(volunteers, bool))
      state = state._replace(upload=(memory,))
    # Copied, so that donating the state leaves the caller's arrays alone.
    codec = jax.tree.map(jnp.array, coding.codec)
    held = jnp.zeros(population, jnp.int32)
    return clients.replicate(
      CodecState(state, codec, jnp.int32(1), held), placement
    )

  def round_fn(state, frozen, examples, cohort, key):
    after, metrics = inner(state.codec).round(
      state.inner, frozen, examples, cohort, key
    )
    old = state.held[cohort.clients]
    present = clients.takes_part(cohort.weights) & metrics["finite"]
    new = jnp.where(present, state.version, old)
    setup = jnp.where(old < state.version, coding.setup_bytes, 0)
    metrics = metrics | {"download_bytes": metrics["download_bytes"] + setup}
    if volunteers is not None:
      (memory,) = after.upload
      whole = base.Dense(ravel_pytree(state.trainable)[0])
      dense, _ = channels.sizes(whole)
      raw = jnp.where(memory.volunteers[cohort.clients], dense, 0)
      metrics |= {"upload_bytes": metrics["upload_bytes"] + raw}
    held = state.held.at[cohort.clients].set(new)
    after = state._replace(inner=after, held=held)
    return clients.replicate(after, placement), metrics

  def received(state, key):
    return first.received(state.inner, key)

  residual_of = first.residual
  return first._replace(
    init=init,
    round=round_fn,
    received=received,
    residual=residual_of and (lambda state: residual_of(state.inner)),
  )


def known(state: CodecState) -> np.ndarray:
  """Returns the clients' last vectors, to fit a codec to: [count, n].

  Each client that has taken part has one row, in the order of client numbers:
  the vector that went into the codec if the client volunteers, else the decoded
  vector.

  Raises:
    ValueError: if the algorithm was made without `volunteers`.
  """
  upload = state.inner.upload[0]
  if not isinstance(upload, Known):
    raise ValueError(
      "known expected rounds with `volunteers`; without them the server keeps"
      " nothing of clients."
    )
  return np.asarray(upload.vector)[np.asarray(state.held) > 0]


def refitted(state: CodecState, codec: Any) -> CodecState:
  """Returns the state with a new codec; clients will fetch its encoder.

  Args:
    state: state of the rounds.
    codec: new codec, with arrays of the same shapes as the old one's.

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
      " compiled for. Fit the same network, or the same number of components."
    )
  place = lambda new, old: jax.device_put(
    np.asarray(new, old.dtype), old.sharding
  )
  return state._replace(
    codec=jax.tree.map(place, codec, state.codec), version=state.version + 1
  )
