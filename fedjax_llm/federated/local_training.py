"""Local training: the loop over one client's steps, and what it returns."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

# See `local_steps`.
BatchGradient = Callable[..., tuple[Any, tuple[Array, Array]]]


class Training(NamedTuple):
  """What local training returns.

  Attributes:
    trainable: the trained parameters.
    loss: the loss summed over all steps, each before its update.
    count: how many tokens (or examples) the loss was summed over.
  """

  trainable: Any
  loss: Any
  count: Any


@dataclasses.dataclass(frozen=True)
class LocalUpdate:
  """The training that one client does in one round; call it as a function.

  A plain function with the same arguments works too, but promises no privacy.

  Attributes:
    train: `(trainable, frozen, examples, indices, mask, key, trains=None) ->
      Training`.
    example_noise_multiplier: the standard deviation of the noise in the sum of
      a batch's clipped gradients, in clip norms; None if the gradients of
      single examples are not clipped.
  """

  train: Callable[..., Training]
  example_noise_multiplier: float | None = None

  def __call__(self, *arguments: Any, **options: Any) -> Training:
    """Calls `train`."""
    return self.train(*arguments, **options)


def check_optimizer(name: str, optimizer: Any) -> None:
  """Raises a `ValueError` if `optimizer` is not an optax optimizer."""
  if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
    raise ValueError(
      f"expected {name} to be an optimizer, such as optax.sgd(0.1), got"
      f" {optimizer!r}."
    )


def batch_gradient(
  loss_fn: Callable[..., tuple[Array, Array]],
) -> BatchGradient:
  """Makes the gradient function of a batch's mean loss.

  Args:
    loss_fn: see `clients.local_update`.
  """

  def mean_loss(trainable, frozen, examples, mask, key):
    sums = loss_fn(trainable, frozen, examples, mask, key)
    if not (isinstance(sums, tuple) and len(sums) == 2):
      raise ValueError(
        "expected loss_fn to return (total, count), the summed loss of a batch"
        f" and what to divide it by, got a {type(sums).__name__}."
      )
    total, count = sums
    return total / jnp.maximum(count, 1), (total, count)

  def gradient_fn(*batch, trains):
    gradient, sums = jax.grad(mean_loss, has_aux=True)(*batch)
    return only(trains, gradient), sums

  return gradient_fn


def local_steps(
  gradient_fn: BatchGradient, optimizer: optax.GradientTransformation
) -> LocalUpdate:
  """Makes a client's training from a custom batch-gradient function.

  Args:
    gradient_fn: `(trainable, frozen, examples, mask, key, trains=) ->
      (gradient, (total, count))`, of a batch; see `clients.local_update`. The
      gradient is zero where `trains` is False.
    optimizer: steps on the gradient.

  Raises:
    ValueError: if `optimizer` is not an optax optimizer.
  """
  check_optimizer("the client's optimizer", optimizer)

  def fn(trainable, frozen, examples, indices, mask, key, trains=None):
    def gradients(trainable, number):
      rows = lambda x: jnp.asarray(x)[indices[number]]
      batch = jax.tree.map(rows, examples)
      step_key = jax.random.fold_in(key, number)
      return gradient_fn(
        trainable, frozen, batch, mask[number], step_key, trains=trains
      )

    def step(number, carry):
      trainable, state, loss, count = carry
      gradient, (total, seen) = gradients(trainable, number)
      updates, state = optimizer.update(gradient, state, trainable)
      # Some optimizers also decay parameters without a gradient.
      updates = only(trains, updates)
      trainable = optax.apply_updates(trainable, updates)
      after = (trainable, state, loss + total, count + seen)
      keep = lambda new, old: jnp.where(is_real[number], new, old)
      return jax.tree.map(keep, after, carry)

    # Not a `cond` in each step: vmap would make it a `select`, and would batch
    # all its operands, `frozen` too.
    is_real = mask.any(axis=1)
    steps = jnp.max(jnp.where(is_real, jnp.arange(len(mask)) + 1, 0))
    _, sums = jax.eval_shape(gradients, trainable, 0)
    zeros = jax.tree.map(jnp.zeros_like, sums)
    start = (trainable, optimizer.init(trainable), *zeros)
    trainable, _, loss, count = jax.lax.fori_loop(0, steps, step, start)
    return Training(trainable, loss, count)

  return LocalUpdate(fn)


def only(trains: Any, tree: Any) -> Any:
  """Sets `tree` to zero where `trains` is False; None keeps all of it."""
  if trains is None:
    return tree
  return jax.tree.map(lambda keep, x: jnp.where(keep, x, 0), trains, tree)
