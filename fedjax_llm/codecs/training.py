"""One training step of a codec, on the error of the vector that would arrive.

The loss is the mean squared error of the vector, with its latent quantised as
in a message. The gradient treats the quantiser as the identity (straight
through), so the network learns to make the most of the bits of a latent.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fedjax_llm.codecs import autoencoder, layouts, networks
from fedjax_llm.compression import base, quantize


def step(
  network: networks.Network,
  layout: layouts.Layout,
  optimizer: optax.GradientTransformation,
  scale: Float[Array, " columns"],
) -> Callable[..., tuple[dict[str, Any], Any, jax.Array]]:
  """Makes the step function; jit it.

  Args:
    network: networks of both ends.
    layout: layout of the vectors.
    optimizer: optimizer of the parameters of both ends.
    scale: divisors of the columns of images, see `autoencoder.Codec`.

  Returns:
    `fn(variables, optimizer_state, vectors) -> (variables, optimizer_state,
    loss)`. `variables` is a dictionary with the keys "encoder" and "decoder".
    `vectors` is [batch, n]. The loss is divided by the mean square of `scale`.
  """
  encoder, decoder = map(_in_training, (network.encoder, network.decoder))
  # Weights errors as in the vector; padding does not count.
  is_real = (layout.positions < layout.size)[None]
  weights = is_real * (scale**2 / jnp.mean(scale**2)).reshape(1, 1, -1)

  def loss_fn(parameters, variables, images):
    apply = lambda module, end, x: module.apply(
      {**variables[end], "params": parameters[end]}, x, mutable="batch_stats"
    )
    latents, encoder_stats = apply(encoder, "encoder", images)
    received, decoder_stats = apply(
      decoder, "decoder", _as_sent(network, latents)
    )
    error = received.reshape(images.shape) - images
    moments = {"encoder": encoder_stats, "decoder": decoder_stats}
    loss = jnp.sum(weights * error**2) / (len(images) * layout.size)
    return loss, moments

  def fn(variables, memory, batch):
    images = jax.vmap(layout.pack)(batch) / scale.reshape(1, 1, -1)
    parameters = parameters_of(variables)
    (loss, moments), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
      parameters, variables, images
    )
    updates, memory = optimizer.update(gradient, memory, parameters)
    after: Any = optax.apply_updates(parameters, updates)
    join = lambda end: {**moments[end], "params": after[end]}
    return {end: join(end) for end in moments}, memory, loss

  return fn


def parameters_of(variables: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters of both ends, without batch statistics."""
  return {end: variables[end]["params"] for end in variables}


def _as_sent(network: networks.Network, latents: jax.Array) -> jax.Array:
  """Returns the latents that arrive, with the gradient of the identity.

  Entries far beyond the last level get no gradient; otherwise they would grow
  without bound.
  """
  quantiser, bits = autoencoder.latent_quantiser(network), network.bits
  if quantiser is None or bits is None:
    return latents
  farthest = 2 * float(quantize.gaussian_levels(bits)[-1])

  def one(latent):
    flat, key = latent.ravel(), jax.random.key(0)
    arrived = base.transmit(quantiser, flat, (), key).received
    limit = farthest * jnp.sqrt(jnp.mean(jax.lax.stop_gradient(flat) ** 2))
    within = jnp.clip(flat, -limit, limit)
    through = within + jax.lax.stop_gradient(arrived - within)
    return through.reshape(latent.shape)

  return jax.vmap(one)(latents)


def _in_training(module):
  """Returns a module that normalises by batch statistics, if it can."""
  return module.clone(train=True) if hasattr(module, "train") else module
