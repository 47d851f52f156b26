"""The networks of CG-FedLLM's autoencoders, as Flax modules.

Encoder and decoder are separate modules: a client holds the parameters of the
encoder, the server those of the decoder.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

# Channels of the ResNet's stride-2 layers, and its number of residual blocks.
CHANNELS = (2, 4, 8, 16, 32, 64)
BLOCKS = 3
# Channels of the one-dimensional network, and the size of its kernels.
CHANNELS_1D = (8, 16, 32, 64, 1)
KERNEL_1D = 5


@dataclasses.dataclass(frozen=True)
class Network:
  """Both ends of an autoencoder, without their parameters.

  Attributes:
    encoder: module from images [n, height, width] to latents [n, ...].
    decoder: module from latents to images.
    bits: bits per latent entry in a message, by `compression.lloyd_max`; None
      for float32.
  """

  encoder: nn.Module
  decoder: nn.Module
  bits: int | None = None


def resnet(
  *, stem: int = 1, linear: bool = False, bits: int | None = None
) -> Network:
  """Makes CG-FedLLM's ResNet; the defaults are the paper's.

  Args:
    stem: channels at full resolution. The paper has one; its ReLU sets about
      half of the values to zero.
    linear: whether to leave out the decoder's tanh.
    bits: bits per latent entry, see `Network`.
  """
  return Network(ResNetEncoder(stem), ResNetDecoder(stem, linear), bits)


def convolutional(*, bits: int | None = None) -> Network:
  """Makes CG-FedLLM's one-dimensional CNN, as far as the paper specifies it."""
  return Network(ConvolutionalEncoder(), ConvolutionalDecoder(), bits)


class ResidualBlock(nn.Module):
  """Adds to its input x what two convolutions make of x."""

  train: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Returns images of the same shape."""
    channels = x.shape[-1]
    y = _reflect(x, 1)
    y = nn.relu(_normalised(self, _convolution(channels, 3)(y)))
    y = _reflect(y, 1)
    return x + _normalised(self, _convolution(channels, 3)(y))


class ResNetEncoder(nn.Module):
  """CG-FedLLM's ResNet encoder, with 246,785 parameters as in the paper.

  One channel at full resolution, six convolutions of stride two up to 64
  channels, three residual blocks (arXiv 2405.13746v3, appendix). The latent has
  exactly 1/64 of the entries.

  Attributes:
    stem: channels at full resolution; 1 in the paper.
    train: whether to normalise by the mean and variance of the batch; if not,
      by the running ones.
  """

  stem: int = 1
  train: bool = False

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w"]
  ) -> Float[Array, "n h/64 w/64 64"]:
    """Returns the latents of images.

    Raises:
      ValueError: if a side is not a multiple of 64, or is below 128.
    """
    if any(side % 64 or side < 128 for side in images.shape[1:]):
      raise ValueError(
        "expected images with sides of at least 128, all multiples of 64, got"
        f" {images.shape[1:]}. layouts.flat makes such images."
      )
    x = _convolution(self.stem, 3)(_reflect(images[..., None], 1))
    x = nn.relu(_normalised(self, x))
    for channels in CHANNELS:
      x = _convolution(channels, 3, strides=2, padding=1)(x)
      x = nn.relu(_normalised(self, x))
    for _ in range(BLOCKS):
      x = ResidualBlock(self.train)(x)
    return x


class ResNetDecoder(nn.Module):
  """CG-FedLLM's ResNet decoder, with 246,698 parameters as in the paper.

  Three residual blocks, six transposed convolutions back to one channel, a 7 x
  7 convolution and tanh, which bounds the output to (-1, 1).

  Attributes:
    stem: channels at full resolution; 1 in the paper.
    linear: whether to leave out the tanh.
    train: whether to normalise by the mean and variance of the batch; if not,
      by the running ones.
  """

  stem: int = 1
  linear: bool = False
  train: bool = False

  @nn.compact
  def __call__(
    self, latents: Float[Array, "n h w 64"]
  ) -> Float[Array, "n 64*h 64*w"]:
    """Returns the images of latents."""
    x = latents
    for _ in range(BLOCKS):
      x = ResidualBlock(self.train)(x)
    for channels in (*CHANNELS[-2::-1], self.stem):
      # Doubles the size, as PyTorch does with padding 1 and output padding 1.
      x = nn.ConvTranspose(
        channels, (3, 3), (2, 2), padding=((1, 2), (1, 2)), use_bias=False
      )(x)
      x = nn.relu(_normalised(self, x))
    x = _convolution(1, 7, use_bias=True)(_reflect(x, 3))[..., 0]
    return x if self.linear else jnp.tanh(x)


class ConvolutionalEncoder(nn.Module):
  """CG-FedLLM's one-dimensional CNN, whose latent has 1/32 of the entries.

  From the paper: the input is one sequence of all entries, and the shapes give
  a latent of 3.125 % of the entries (its text says 3.21 %). Our choice, where
  the paper is silent: five convolutions of kernel 5, stride 2 and `CHANNELS_1D`
  channels, all but the last with batch normalisation and a ReLU.

  Attributes:
    train: whether to normalise by the mean and variance of the batch; if not,
      by the running ones.
  """

  train: bool = False

  @nn.compact
  def __call__(self, images: Float[Array, "n h w"]) -> Float[Array, "n m 1"]:
    """Returns the latents of images, which are read row by row.

    Raises:
      ValueError: if the number of entries of an image is not a multiple of 32.
    """
    count, height, width = images.shape
    if height * width % 32:
      raise ValueError(
        "expected images whose number of entries is a multiple of 32, got"
        f" {height} x {width}."
      )
    x = images.reshape(count, height * width, 1)
    for channels in CHANNELS_1D[:-1]:
      x = nn.Conv(channels, (KERNEL_1D,), 2, padding=2, use_bias=False)(x)
      x = nn.relu(_normalised(self, x))
    return nn.Conv(CHANNELS_1D[-1], (KERNEL_1D,), 2, padding=2)(x)


class ConvolutionalDecoder(nn.Module):
  """The mirror of `ConvolutionalEncoder`, with tanh at the end.

  Attributes:
    train: whether to normalise by the mean and variance of the batch; if not,
      by the running ones.
  """

  train: bool = False

  @nn.compact
  def __call__(
    self, latents: Float[Array, "n m 1"]
  ) -> Float[Array, "n 32*m 1"]:
    """Returns the images of latents, as one column."""
    x = latents
    for channels in (*CHANNELS_1D[-2::-1], 1):
      last = channels == 1
      x = nn.ConvTranspose(
        channels, (KERNEL_1D,), (2,), padding=((2, 3),), use_bias=last
      )(x)
      x = jnp.tanh(x) if last else nn.relu(_normalised(self, x))
    return x


def _convolution(channels, width, *, strides=1, padding=0, use_bias=False):
  return nn.Conv(
    channels, (width, width), strides, padding=padding, use_bias=use_bias
  )


def _normalised(module, x):
  """Batch normalisation with PyTorch's constants."""
  return nn.BatchNorm(
    use_running_average=not module.train, momentum=0.9, epsilon=1e-5
  )(x)


def _reflect(x, width):
  sides = (width, width)
  return jnp.pad(x, ((0, 0), sides, sides, (0, 0)), mode="reflect")
