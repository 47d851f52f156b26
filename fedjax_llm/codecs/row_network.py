"""Our network: the rows of an image, each by the same small perceptron.

Updates are nearly white along any axis that a convolution could slide over, but
for what differs between layers, modules and factors, and between entries: some
move far more than others. `layouts.columns` and `square` lay the former
side by side, in the same place of every row, `layouts.ranked` the latter,
so that dense layers over a row have weights of their own for each: they learn
which entries are worth a bit and which are not. The latent is quantised while
the network trains (`networks.Network.bits`), so that its bytes are what is made
the most of.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_llm.codecs import networks


def network(
  width: int, *, latents: int, hidden: int = 0, bits: int | None = 1
) -> networks.Network:
  """A codec of rows.

  Args:
    width: of the images.
    latents: entries of the latent of a row, so that an entry of the vector
      takes about latents * bits / width bits.
    hidden: of the two hidden layers of each end; 0 for linear maps alone.
    bits: see `networks.Network`.

  Raises:
    ValueError: if a number is out of range.
  """
  if not (width > 0 and latents > 0 and hidden >= 0):
    raise ValueError(
      "row_network.network expected width and latents > 0, hidden >= 0, got"
      f" {width=}, {latents=}, {hidden=}."
    )
  return networks.Network(
    RowEncoder(latents, hidden), RowDecoder(width, hidden), bits
  )


class RowEncoder(nn.Module):
  """Each row to its latent.

  Attributes:
    latents: entries of a row's latent.
    hidden: of the hidden layers; 0 for none.
  """

  latents: int
  hidden: int = 0

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 1"]
  ) -> Float[Array, "n h latents"]:
    """The latents of images."""
    return _Perceptron(self.latents, self.hidden)(images[..., 0])


class RowDecoder(nn.Module):
  """Each row from its latent; nothing bounds what comes out.

  Attributes:
    width: of the images.
    hidden: of the hidden layers; 0 for none.
  """

  width: int
  hidden: int = 0

  @nn.compact
  def __call__(
    self, latents: Float[Array, "n h latents"]
  ) -> Float[Array, "n h w 1"]:
    """The images of latents."""
    return _Perceptron(self.width, self.hidden)(latents)[..., None]


class _Perceptron(nn.Module):
  """A linear map of the last axis, plus a perceptron of it; zero stays zero."""

  features: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(self.features, use_bias=False, kernel_init=_last_columns)(x)
    if self.hidden:
      for _ in range(2):
        x = nn.gelu(nn.Dense(self.hidden, use_bias=False)(x))
      # It starts as nothing, or quantised training would not settle.
      zeros = nn.initializers.zeros
      y = y + nn.Dense(self.features, use_bias=False, kernel_init=zeros)(x)
    return y


def _last_columns(key, shape, dtype=jnp.float32):
  """Nearly the map that keeps the last columns, or puts them back.

  In `layouts.ranked` they move most. So training starts from their signs,
  or whatever quantises the latent, and mixes columns where that is better.
  """
  inputs, outputs = shape
  start = jnp.eye(inputs, outputs, outputs - inputs, dtype)
  return start + 0.01 * jax.random.normal(key, shape, dtype) / math.sqrt(inputs)
