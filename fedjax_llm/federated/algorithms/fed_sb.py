"""Fed-SB: trains only a square core between the two fixed bases of a layer.

Singhal, Ponkshe, Vartak, Varshney, Vepakomma, "Fed-SB: A Silver Bullet for
Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning", 2025 (arXiv 2502.15436). A layer computes `x @ a @ core @ b`. `a`
[inputs, rank] and `b` [rank, outputs] are fixed and the same at all clients, so
the mean of the cores gives the mean of the products. A message has rank^2
numbers for each layer, whatever the layer's size.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from fedjax_llm.federated import (
  aggregators,
  clients,
  factors,
  local_training,
  parameters,
  rounds,
)
from fedjax_llm.federated.algorithms import fed_avg

Bases = Callable[[Any], Any]


def fed_sb(
  loss_fn: clients.LossFn,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  *,
  bases: Bases,
  make: parameters.Averaging = fed_avg.fed_avg,
  aggregate: aggregators.Aggregator | None = None,
  population: int | None = None,
  placement: clients.Placement | None = None,
) -> rounds.FederatedAlgorithm:
  """Fed-SB. To the model it is LoRA with the factors `a @ core` and `b`.

  A head is trained and sent whole beside the cores.

  Args:
    loss_fn: see `clients.local_update`.
    client_optimizer: the clients' optimizer.
    server_optimizer: the server's; the paper averages: `optax.sgd(1.0)`.
    bases: `gradient_bases(...)` or `random_bases(key)`: a function from LoRA
      factors, of which only the shapes are used, to a tree of initial `a`, `b`
      and `core`.
    make: the algorithm that trains the cores, see `freezing.ffa_lora`.
    aggregate: turns the clients' updates into one; the default of `make` if not
      given.
    population: the number of clients, if the upload keeps a state for each.
    placement: see `clients.Placement`; all devices if not given.

  Raises:
    ValueError: from `init`, if a rank is larger than the smaller side of its
      layer.
  """

  def divide(trainable):
    is_trained = lambda path: parameters.factor(path) is None
    return parameters.split(bases(trainable), is_trained)

  return parameters.parametrised(
    lambda of_cores: make(
      of_cores,
      client_optimizer,
      server_optimizer,
      aggregate=aggregate,
      population=population,
      placement=placement,
    ),
    loss_fn,
    divide=divide,
    join=_factors,
  )


def _factors(cores, bases):
  """Returns the LoRA factors that the model uses."""
  multiply = lambda path, x: {"a": x["a"] @ x["core"], "b": x["b"]}
  return _map_pairs(multiply, parameters.combine(cores, bases))


def random_bases(key: PRNGKeyArray) -> Bases:
  """Random orthonormal bases; cores of zero do not change the base model.

  Both ends draw the bases from the same key, so they are never sent.

  Args:
    key: the key of the draws. A layer's draws do not depend on other layers.
  """

  def pair(path, x):
    a, b = (jnp.asarray(x[name]) for name in "ab")
    rank = a.shape[-1]
    if rank > min(a.shape[-2], b.shape[-1]):
      raise ValueError(
        f"Fed-SB expected a rank of {path or 'the layer'} of at most"
        f" {min(a.shape[-2], b.shape[-1])}, its smaller side, got {rank}. Lower"
        " LoRA's rank."
      )
    keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())))
    return {
      "a": _columns(jax.random.normal(keys[0], a.shape, a.dtype)),
      "b": _rows(jax.random.normal(keys[1], b.shape, b.dtype)),
      "core": jnp.zeros((*a.shape[:-2], rank, rank), a.dtype),
    }

  return lambda trainable: _map_pairs(pair, trainable)


def gradient_bases(
  loss_fn: clients.LossFn,
  frozen: Any,
  examples: Any,
  key: PRNGKeyArray,
  *,
  learning_rate: float,
  iterations: int = 4,
) -> Bases:
  """The leading singular vectors of the gradient of each layer's kernel.

  As in the paper, `a @ core @ b` starts as the first step of full fine-tuning,
  truncated to the rank. The authors take the sign of the gradient, which is
  AdamW's first step and needs gradients as large as the model. This function
  takes the gradient itself, SGD's first step. It computes only its products
  with bases, from the gradients of the LoRA factors (a randomised SVD, Halko,
  Martinsson, Tropp, 2011), so kernels may be quantised.

  The server does this before the first round, with examples that it has. The
  bases, as large as LoRA's factors, must be sent once to each client. The bytes
  of the rounds do not include them.

  Args:
    loss_fn: see `clients.local_update`.
    frozen: the base model's parameters.
    examples: a batch of examples, as `loss_fn` takes it, for the gradient.
    key: the key of the bases' random start and of `loss_fn`.
    learning_rate: the rate of one step of gradient descent on the cores, from
      zero. It is a step with `learning_rate * scale**2` on the kernels, where
      `scale` is LoRA's. 0 to start at the base model.
    iterations: the number of power iterations, at least 1, of two gradients
      each. More are more exact if singular values are close together.

  Raises:
    ValueError: if `iterations` is below 1.
  """
  if iterations < 1:
    raise ValueError(f"gradient_bases expected {iterations=} to be >= 1.")
  mask = jnp.ones(len(jax.tree.leaves(examples)[0]), bool)

  gradient_fn = local_training.batch_gradient(loss_fn)

  @jax.jit
  def slopes(tree, frozen, examples):
    return gradient_fn(tree, frozen, examples, mask, key, trains=None)[0]

  def without(name, tree):
    """Returns the factors with one of them zero, so their product is zero."""
    blank = lambda path, x: (
      {"a": x["a"], "b": x["b"]} | {name: jnp.zeros_like(x[name])}
    )
    return _map_pairs(blank, tree)

  def rows(path, x, slope):
    del path
    return {**x, "b": _rows(slope["b"])}

  def singular(path, x, slope):
    del path
    decompose = functools.partial(jnp.linalg.svd, full_matrices=False)
    left, values, right = factors.one_by_one(decompose, slope["a"])
    diagonal = jnp.vectorize(jnp.diag, signature="(n)->(n,n)")
    core = diagonal(-learning_rate * values)
    return {"a": left, "b": right @ x["b"], "core": core}

  def bases(trainable):
    tree = random_bases(key)(trainable)
    for _ in range(iterations):
      # If `b` is zero, its gradient is the kernel's gradient, times `a`.
      slope = slopes(without("b", tree), frozen, examples)
      tree = _map_pairs(rows, tree, slope)
      slope = slopes(without("a", tree), frozen, examples)
      tree = _map_pairs(singular, tree, slope)
    return tree

  return bases


def _columns(x):
  """Returns an orthonormal basis of the columns of [..., n, rank]."""
  return factors.one_by_one(lambda each: jnp.linalg.qr(each)[0], x)


def _rows(x):
  """Returns an orthonormal basis of the rows of [..., rank, n]."""
  return _columns(x.mT).mT


def _map_pairs(fn, tree, *others, path=""):
  """Replaces each pair of factors by `fn(path, pair, ...)`.

  A pair is the part of a dictionary with the keys `a`, `b` and `core`, if any.
  """
  if not isinstance(tree, Mapping):
    return tree
  of_pair = lambda node: {
    name: x for name, x in node.items() if name in ("a", "b", "core")
  }
  pair = of_pair(tree)
  new = fn(path, pair, *map(of_pair, others)) if pair else {}
  for name in tree.keys() - pair.keys():
    inner = [other[name] for other in others]
    new[name] = _map_pairs(fn, tree[name], *inner, path=f"{path}/{name}")
  return new
