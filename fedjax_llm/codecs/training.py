"""A step of fitting a codec: the gradient of what would arrive.

The loss is the mean squared error in the vector, latents quantised as they will
travel; through the quantiser goes the gradient of the identity, so that the
bytes of a latent are what the network learns to make the most of.
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
  arrangement: layouts.Arrangement,
  optimizer: optax.GradientTransformation,
  scale: Float[Array, " columns"],
) -> Callable[..., tuple[dict[str, Any], Any, jax.Array]]:
  """Makes the step, to be jitted.

  Args:
    network: of both ends.
    arrangement: of the vectors.
    optimizer: steps on the `parameters` of both ends.
    scale: see `autoencoder.Codec`.

  Returns:
    `fn(variables, optimizer_state, vectors) -> (variables, optimizer_state,
    loss)`; variables are those of "encoder" and "decoder", and `vectors` are
    [batch, n]. The loss is in units of the root mean square of `scale`.
  """
  encoder, decoder = map(_in_training, (network.encoder, network.decoder))
  # An error counts as it does in the vector, and padding does not.
  is_real = (arrangement.positions < arrangement.size)[None]
  weights = is_real * (scale**2 / jnp.mean(scale**2)).reshape(1, 1, -1)

  def loss_fn(parameters, variables, images):
    apply = lambda module, end, x: module.apply(
      {**variables[end], "params": parameters[end]}, x, mutable="batch_stats"
    )
    latents, encoder_stats = apply(encoder, "encoder", images[..., None])
    received, decoder_stats = apply(
      decoder, "decoder", _as_sent(network, latents)
    )
    error = received.reshape(images.shape) - images
    moments = {"encoder": encoder_stats, "decoder": decoder_stats}
    loss = jnp.sum(weights * error**2) / (len(images) * arrangement.size)
    return loss, moments

  def fn(variables, memory, batch):
    images = jax.vmap(arrangement.pack)(batch) / scale.reshape(1, 1, -1)
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
  """What the optimizer steps on, without the moments of batches."""
  return {end: variables[end]["params"] for end in variables}


def _as_sent(network: networks.Network, latents: jax.Array) -> jax.Array:
  """What arrives of latents, with the gradient of sending them as they are.

  But for entries far beyond the last level, which would grow without end.
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
  """The module with batches normalised by themselves, if it does so."""
  return module.clone(train=True) if hasattr(module, "train") else module
