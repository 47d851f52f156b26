"""A toy problem, and an oracle of it in plain NumPy loops.

The model has the structure of LoRA with a task head: a frozen `w`, factors `a`
and `b` with `b` zero at the start, and a dense `head`. Clients own 1 to 8
examples, so that most of them are padded.
"""

import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.federated import clients

INPUTS, RANK, HIDDEN = 6, 2, 4
SCALE = 1.5
SIZES = (1, 3, 8, 5, 2, 7, 4)
STARTS = np.cumsum((0, *SIZES))


def loss_fn(trainable, frozen, examples, mask, key):
  del key  # Deterministic.
  x = examples["x"]
  hidden = x @ frozen["w"] + (x @ trainable["a"]) @ trainable["b"]
  losses = (jnp.tanh(hidden) @ trainable["head"] - examples["y"]) ** 2
  return jnp.where(mask, losses, 0).sum(), mask.sum()


def noisy_loss_fn(trainable, frozen, examples, mask, key):
  total, count = loss_fn(trainable, frozen, examples, mask, key)
  noise = jax.random.normal(key, trainable["head"].shape)
  return total + noise @ trainable["head"], count


def scaled_loss_fn(trainable, frozen, *batch):
  """With a scale of the product, and `w` where a base kernel would be."""
  scaled = {**trainable, "a": SCALE * trainable["a"]}
  return loss_fn(scaled, {"w": frozen["kernel"]}, *batch)


class Problem(NamedTuple):
  """Everything in float64 NumPy: JAX rounds it to float32 unless told."""

  trainable: Any
  frozen: Any
  examples: Any
  loss_fn: Any = loss_fn
  noisy_loss_fn: Any = noisy_loss_fn
  scaled_loss_fn: Any = scaled_loss_fn
  scale: float = SCALE
  population: int = len(SIZES)

  def cohort(self, *chosen, order=0, steps=4, batch=2):
    """The cohort of these clients, weighted by their examples.

    Rows come in an order drawn from (order, client); what is padded points to
    rows that have an effect if they are used.
    """
    rows = np.full((len(chosen), steps * batch), STARTS[-1] - 1, np.int32)
    mask = np.zeros(rows.shape, bool)
    for i, client in enumerate(chosen):
      rng = np.random.default_rng([order, client])
      own = STARTS[client] + rng.permutation(SIZES[client])[: steps * batch]
      rows[i, : own.size], mask[i, : own.size] = own, True
    return clients.Cohort(
      np.array(chosen, np.int32),
      rows.reshape(len(chosen), steps, batch),
      mask.reshape(len(chosen), steps, batch),
      np.array([SIZES[client] for client in chosen], np.float32),
    )

  def cohorts(self, rounds, size=3):
    """A different cohort every round."""
    everyone = np.random.default_rng(5)
    draw = lambda: everyone.choice(len(SIZES), size, replace=False).tolist()
    return [self.cohort(*draw(), order=i) for i in range(rounds)]


@pytest.fixture(scope="session")
def problem():
  rng = np.random.default_rng(0)
  return Problem(
    trainable={
      "a": rng.uniform(-0.4, 0.4, (INPUTS, RANK)),
      "b": np.zeros((RANK, HIDDEN)),
      "head": rng.normal(0, 0.5, HIDDEN),
    },
    frozen={"w": rng.normal(0, 0.5, (INPUTS, HIDDEN))},
    examples={
      "x": rng.normal(0, 1, (STARTS[-1], INPUTS)),
      "y": rng.normal(0, 1, STARTS[-1]),
    },
  )


@pytest.fixture(scope="session")
def recorder():
  """A server optimizer that moves nothing and keeps the update it was given."""
  zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
  return optax.GradientTransformation(
    init=zeros, update=lambda update, state, params: (zeros(update), update)
  )


# The oracle. Parameters are flat, in the order a, b, head.


def flatten(tree):
  return np.concatenate([np.ravel(tree[name]) for name in ("a", "b", "head")])


def gradient(flat, w, x, y, scale=1.0):
  """The gradient, by hand, of (tanh(x (w + scale a b)) head - y)^2."""
  split = INPUTS * RANK, (INPUTS + HIDDEN) * RANK
  a, b, head = np.split(flat, split)
  a, b = a.reshape(INPUTS, RANK), b.reshape(RANK, HIDDEN)
  low = scale * x @ a
  hidden = np.tanh(x @ w + low @ b)
  error = 2 * (hidden @ head - y)
  back = error * head * (1 - hidden**2)
  parts = np.outer(x, scale * b @ back), np.outer(low, back), error * hidden
  return np.concatenate([part.ravel() for part in parts])


def local_sgd(problem, flat, indices, mask, rate, momentum, scale=1.0):
  velocity = np.zeros_like(flat)
  for rows, real in zip(indices, mask, strict=True):
    own = rows[real]
    if own.size == 0:
      continue
    total = np.zeros_like(flat)
    for row in own:
      x, y = problem.examples["x"][row], problem.examples["y"][row]
      total += gradient(flat, problem.frozen["w"], x, y, scale)
    velocity = momentum * velocity + total / own.size
    flat = flat - rate * velocity
  return flat


def top_k(vector, density):
  kept = max(1, int(len(vector) * density))
  order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
  result = np.zeros_like(vector)
  for i in order[:kept]:
    result[i] = vector[i]
  return result


def adamw(rate, decay=0.01):
  """torch's AdamW with its defaults: (parameters, gradient) -> parameters."""
  steps, first, second = 0, 0.0, 0.0

  def step(flat, update):
    nonlocal steps, first, second
    steps += 1
    first = 0.9 * first + 0.1 * update
    second = 0.999 * second + 0.001 * update**2
    mean, square = first / (1 - 0.9**steps), second / (1 - 0.999**steps)
    flat = flat - rate * decay * flat
    return flat - rate * mean / (np.sqrt(square) + 1e-8)

  return step


@pytest.fixture(scope="session")
def oracle():
  return types.SimpleNamespace(
    flatten=flatten,
    gradient=gradient,
    local_sgd=local_sgd,
    top_k=top_k,
    adamw=adamw,
  )
