"""Private means: releases that depend little on any one client.

Client-level central differential privacy (McMahan et al., "Learning
Differentially Private Recurrent Language Models", 2018). The server clips every
update as it arrives, after compression. It adds up the updates, adds Gaussian
noise to every entry, sent or not, and divides by a number that does not depend
on who answered. `guarantees.ClientLevel` computes the epsilon.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_llm.federated import aggregators


def private_mean(
  *,
  clip_norm: float,
  noise_multiplier: float,
  clients: int,
) -> aggregators.Aggregator:
  """The noisy sum of clipped updates, over the expected number of clients.

  Each update counts once; a weight only says whether the client takes part. A
  client that does not, or whose update is not finite, adds zeros. A round
  without clients releases noise, and the server steps on it
  (`steps_when_empty`). Otherwise unchanged parameters would reveal that the
  cohort was empty. With Poisson sampling, this depends on every single client.

  Args:
    clip_norm: bound S of an update's L2 norm, > 0; infinite for none.
    noise_multiplier: z >= 0; the noise in the sum has a standard deviation of
      z S in every entry.
    clients: the expected number of clients in a round, by which the sum is
      divided. (The actual number would depend on every single client.)

  Raises:
    ValueError: if a number is out of range, or there is noise without a bound.
      While tracing, if updates are narrower than float32: rounding could exceed
      the bound.
  """
  check(clip_norm=clip_norm, noise_multiplier=noise_multiplier)
  _check_clients(clients)

  def share(update, weight, state):
    del state
    _check_precision(update)
    return jnp.where(weight > 0, clip(update, clip_norm), 0)

  def finish(total, state, key):
    total = add_noise(total, clip_norm, noise_multiplier, key)
    return total / clients, state

  return aggregators.Aggregator(
    lambda: (),
    share,
    finish,
    steps_when_empty=True,
    noise_multiplier=noise_multiplier,
  )


def adaptive_private_mean(
  *,
  initial_clip_norm: float,
  quantile: float,
  noise_multiplier: float,
  count_noise: float,
  clients: int,
  clip_learning_rate: float = 0.2,
) -> aggregators.Aggregator:
  """A private mean whose clip norm follows a quantile of the updates' norms.

  Andrew et al., "Differentially Private Learning with Adaptive Clipping", 2021.
  The state is the clip norm S. After each round S is multiplied by exp(-rate
  (b - quantile)), where b is the share of the norms that were at most S: a
  noisy count divided by `clients`. The updates get a little more noise than
  z S, so that both releases together cost what `noise_multiplier` says.

  Args:
    initial_clip_norm: S in the first round, > 0.
    quantile: the quantile of the norms to follow, in [0, 1]; the paper takes
      0.5.
    noise_multiplier: the noise multiplier of both releases together, z >= 0.
    count_noise: the standard deviation of the noise in the number of norms that
      were at most S, > z / 2 if z > 0; the paper takes clients / 20.
    clients: as in `private_mean`. If fewer take part, b is nearer to 1/2.
    clip_learning_rate: the rate in the update of S, > 0.

  Raises:
    ValueError: if a number is out of range. While tracing, if updates are
      narrower than float32.
  """
  check(clip_norm=initial_clip_norm, noise_multiplier=noise_multiplier)
  _check_clients(clients)
  if math.isinf(initial_clip_norm):
    raise ValueError(f"expected a finite norm, got {initial_clip_norm=}.")
  if not 0 <= quantile <= 1:
    raise ValueError(f"expected quantile in [0, 1], got {quantile=}.")
  if not clip_learning_rate > 0:
    raise ValueError(f"expected {clip_learning_rate=} to be > 0.")
  if count_noise < 0 or 0 < noise_multiplier >= 2 * count_noise:
    raise ValueError(
      f"expected count_noise > {noise_multiplier=} / 2, got {count_noise=}."
      " Otherwise the count alone costs more than both releases may cost."
    )
  multiplier = noise_multiplier
  if noise_multiplier:
    # One client moves a count of halves, up or down, by 1/2.
    multiplier = (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5

  def share(update, weight, clip_norm):
    _check_precision(update)
    is_below = jnp.linalg.norm(update) <= clip_norm
    halves = jnp.where(is_below, 0.5, -0.5).astype(update.dtype)
    shares = clip(update, clip_norm), halves
    return jax.tree.map(lambda x: jnp.where(weight > 0, x, 0), shares)

  def finish(total, clip_norm, key):
    update, halves = total
    update_key, count_key = jax.random.split(key)
    update = add_noise(update, clip_norm, multiplier, update_key)
    halves += count_noise * jax.random.normal(count_key, dtype=halves.dtype)
    excess = 0.5 + halves / clients - quantile
    return update / clients, clip_norm * jnp.exp(-clip_learning_rate * excess)

  init = lambda: jnp.asarray(initial_clip_norm, float)
  return aggregators.Aggregator(
    init,
    share,
    finish,
    steps_when_empty=True,
    noise_multiplier=noise_multiplier,
  )


def clip(
  vector: Float[Array, " n"], norm: float | Float[Array, ""]
) -> Float[Array, " n"]:
  """Scales a vector down to an L2 norm of at most `norm`.

  A vector that is not finite becomes zero, because no bound holds for it.
  """
  length = jnp.linalg.norm(vector)
  clipped = vector / jnp.maximum(length / norm, 1)
  return jnp.where(jnp.isfinite(length), clipped, 0)


def add_noise(
  total: Float[Array, " n"],
  clip_norm: float | Float[Array, ""],
  noise_multiplier: float,
  key: Array,
) -> Float[Array, " n"]:
  """Adds N(0, (noise_multiplier * clip_norm)^2) to every entry."""
  if noise_multiplier == 0:  # The norm may be infinite.
    return total
  noise = jax.random.normal(key, total.shape, total.dtype)
  return total + noise_multiplier * clip_norm * noise


def check(*, clip_norm: float, noise_multiplier: float) -> None:
  """Refuses an invalid clip norm or noise multiplier.

  Raises:
    ValueError: see `private_mean`.
  """
  if not clip_norm > 0:
    raise ValueError(f"expected clip_norm > 0, got {clip_norm=}.")
  check_noise(noise_multiplier)
  if noise_multiplier > 0 and math.isinf(clip_norm):
    raise ValueError(
      f"expected a finite clip_norm with {noise_multiplier=}, got {clip_norm=}."
      " Noise hides only what is bounded."
    )


def check_noise(noise_multiplier: float) -> None:
  """Refuses an invalid noise multiplier.

  Raises:
    ValueError: if it is negative, infinite or NaN.
  """
  if not 0 <= noise_multiplier < math.inf:
    raise ValueError(f"expected {noise_multiplier=} to be >= 0 and finite.")


def _check_clients(clients):
  if clients < 1:
    raise ValueError(f"expected clients >= 1, got {clients=}.")


def _check_precision(update):
  if jnp.finfo(update.dtype).bits < 32:
    raise ValueError(
      f"expected updates of float32 or more, got {update.dtype}: rounded, they"
      " would exceed the clip norm. Train parameters of float32."
    )
