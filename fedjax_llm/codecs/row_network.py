"""Our network: the same linear map codes every row of an image.

Updates are nearly white along any axis that a convolution could slide over. But
how much an entry moves depends on its layer, module and factor, and on the
entry itself. `layouts.columns`, `square` and `ranked` put entries that move
alike in the same column, so a linear map of a row learns which columns are
worth bits. The latent is quantised during the fit (`networks.Network.bits`), so
the network learns to make the most of its bits.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_llm.codecs import networks


def network(
  width: int, *, latents: int, bits: int | None = 1
) -> networks.Network:
  """Makes a network that codes rows.

  A message takes about latents * bits / width bits per vector entry.

  Args:
    width: width of the images.
    latents: number of latent entries per row.
    bits: bits per latent entry, see `networks.Network`.

  Raises:
    ValueError: if a number is out of range.
  """
  if not (width > 0 and latents > 0):
    raise ValueError(
      "row_network.network expected width and latents > 0, got"
      f" {width=}, {latents=}."
    )
  return networks.Network(Rows(latents), Rows(width), bits)


class Rows(nn.Module):
  """A linear map of each row by itself, without bias.

  Attributes:
    features: number of entries in an output row.
  """

  features: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "n h entries"]
  ) -> Float[Array, "n h features"]:
    """Maps the rows of images to latents, or back; zero stays zero."""
    dense = nn.Dense(self.features, use_bias=False, kernel_init=_last_columns)
    return dense(x)


def _last_columns(key, shape, dtype=jnp.float32):
  """Initial kernel: nearly the map that keeps the last columns.

  In `layouts.ranked` the last columns move most. So training starts by sending
  only the columns that matter, and mixes columns where that is better.
  """
  inputs, outputs = shape
  start = jnp.eye(inputs, outputs, outputs - inputs, dtype)
  return start + 0.01 * jax.random.normal(key, shape, dtype) / math.sqrt(inputs)
