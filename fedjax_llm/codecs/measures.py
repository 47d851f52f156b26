"""What a codec transmits: errors, signal-to-noise ratios and cosines."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Vectors = Float[Array, "*batch n"]
Numbers = Float[Array, "*batch"]


def relative_squared_error(vectors: Vectors, received: Vectors) -> Numbers:
  """Squared error over squared norm: 0 is exact, 1 as good as sending zero."""
  return _energy(vectors - received) / _energy(vectors)


def snr_db(vectors: Vectors, received: Vectors) -> Numbers:
  """The signal-to-noise ratio in decibels; 0 as good as sending zero."""
  return -10 * jnp.log10(relative_squared_error(vectors, received))


def snr_of_the_paper(vectors: Vectors, received: Vectors) -> Numbers:
  """CG-FedLLM's ratio (Table 1): a sum over a mean, n times the usual one.

  Sending zero has a ratio of n by it, 8,388,608 for LLaMA-7B. For comparison
  with the paper alone.
  """
  return vectors.shape[-1] / relative_squared_error(vectors, received)


def cosine(vectors: Vectors, received: Vectors) -> Numbers:
  """The cosine of the angle between what was sent and what arrived; 0 for zero.

  Of the mean over clients it is the aggregate-update cosine.
  """
  product = jnp.sum(vectors * received, axis=-1)
  norms = jnp.sqrt(_energy(vectors) * _energy(received))
  return jnp.where(norms > 0, product / jnp.where(norms > 0, norms, 1), 0)


def innovation_cosine(
  vectors: Float[Array, "clients n"], received: Float[Array, "clients n"]
) -> Numbers:
  """The mean cosine of what tells each client from the mean of all.

  A decoder that ignores its input sends everyone the same: nothing of what is a
  client's own arrives, and this is 0, whatever the squared error is.

  Args:
    vectors: of at least two clients of a round.
    received: what arrived of them.

  Raises:
    ValueError: if there are fewer than two clients.
  """
  if len(vectors) < 2:
    raise ValueError(
      f"innovation_cosine expected two clients or more, got {len(vectors)}."
    )
  own = lambda x: x - x.mean(axis=0, keepdims=True)
  return jnp.mean(cosine(own(vectors), own(received)))


def _energy(vectors):
  return jnp.sum(jnp.square(vectors), axis=-1)
