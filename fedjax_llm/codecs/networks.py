"""The networks of CG-FedLLM's autoencoders, as Flax modules.

Images are [batch, height, width, 1], the order that XLA prefers; the paper
writes [1, height, width]. Encoder and decoder are modules of their own: a
client holds the parameters of the one, the server those of the other.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

# Channels of the layers of stride two.
CHANNELS = (2, 4, 8, 16, 32, 64)
BLOCKS = 3
# Those of the one-dimensional network, and the size of its kernels.
CHANNELS_1D = (8, 16, 32, 64, 1)
KERNEL_1D = 5


@dataclasses.dataclass(frozen=True)
class Network:
  """Both ends of an autoencoder without their parameters: what is static.

  Attributes:
    encoder: from images [n, height, width, 1] to latents [n, ...].
    decoder: back.
    bits: in which each entry of a latent travels, by `compression.lloyd_max`;
      None for float32.
  """

  encoder: nn.Module
  decoder: nn.Module
  bits: int | None = None


def resnet(
  *, stem: int = 1, linear: bool = False, bits: int | None = None
) -> Network:
  """CG-FedLLM's ResNet, to the letter unless told otherwise.

  Args:
    stem: channels at full resolution, where the paper has one, which a ReLU
      cuts in half.
    linear: leave out the decoder's tanh.
    bits: see `Network`.
  """
  return Network(ResNetEncoder(stem), ResNetDecoder(stem, linear), bits)


def convolutional(*, bits: int | None = None) -> Network:
  """CG-FedLLM's one-dimensional CNN, as far as it is known: see its modules."""
  return Network(ConvolutionalEncoder(), ConvolutionalDecoder(), bits)


class ResidualBlock(nn.Module):
  """x plus two convolutions of it."""

  train: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """The same shape."""
    channels = x.shape[-1]
    y = _reflect(x, 1)
    y = nn.relu(_normalised(self, _convolution(channels, 3)(y)))
    y = _reflect(y, 1)
    return x + _normalised(self, _convolution(channels, 3)(y))


class ResNetEncoder(nn.Module):
  """CG-FedLLM's ResNet encoder, to the letter: 246,785 parameters.

  One channel at full resolution, six convolutions of stride two up to 64
  channels, three residual blocks (arXiv 2405.13746v3, appendix). The
  latent has exactly a 64th of the entries.

  Attributes:
    stem: channels at full resolution; the paper has one.
    train: whether batches are normalised by their own moments.
  """

  stem: int = 1
  train: bool = False

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 1"]
  ) -> Float[Array, "n h/64 w/64 64"]:
    """The latents of images whose sides are multiples of 64, 128 or more.

    Raises:
      ValueError: if they are not.
    """
    if any(side % 64 or side < 128 for side in images.shape[1:3]):
      raise ValueError(
        "expected images whose sides are multiples of 64, 128 or more, got"
        f" {images.shape[1:3]}. layouts.flat makes such."
      )
    x = _convolution(self.stem, 3)(_reflect(images, 1))
    x = nn.relu(_normalised(self, x))
    for channels in CHANNELS:
      x = _convolution(channels, 3, strides=2, padding=1)(x)
      x = nn.relu(_normalised(self, x))
    for _ in range(BLOCKS):
      x = ResidualBlock(self.train)(x)
    return x


class ResNetDecoder(nn.Module):
  """CG-FedLLM's ResNet decoder, to the letter: 246,698 parameters.

  Three residual blocks, six transposed convolutions back to one channel, a
  convolution of 7 x 7 and tanh, so that nothing beyond (-1, 1) can come out.

  Attributes:
    stem: channels at full resolution; the paper has one.
    linear: leave out the tanh.
    train: whether batches are normalised by their own moments.
  """

  stem: int = 1
  linear: bool = False
  train: bool = False

  @nn.compact
  def __call__(
    self, latents: Float[Array, "n h w 64"]
  ) -> Float[Array, "n 64*h 64*w 1"]:
    """The images of latents."""
    x = latents
    for _ in range(BLOCKS):
      x = ResidualBlock(self.train)(x)
    for channels in (*CHANNELS[-2::-1], self.stem):
      # As PyTorch's with padding 1 and output padding 1: twice the size.
      x = nn.ConvTranspose(
        channels, (3, 3), (2, 2), padding=((1, 2), (1, 2)), use_bias=False
      )(x)
      x = nn.relu(_normalised(self, x))
    x = _convolution(1, 7, use_bias=True)(_reflect(x, 3))
    return x if self.linear else jnp.tanh(x)


class ConvolutionalEncoder(nn.Module):
  """CG-FedLLM's one-dimensional CNN: a latent of a 32nd of the entries.

  Of the paper's is known that it is a CNN over the entries as one sequence, and
  that its shapes give a ratio of 3.125 % (the text has 3.21 %). The rest is
  chosen here: five convolutions of kernel 5 and stride two, of `CHANNELS_1D`
  channels, each but the last with batch normalisation and a ReLU.

  Attributes:
    train: whether batches are normalised by their own moments.
  """

  train: bool = False

  @nn.compact
  def __call__(self, images: Float[Array, "n h w 1"]) -> Float[Array, "n m 1"]:
    """The latents of images, read row by row.

    Raises:
      ValueError: if the entries of an image are not a multiple of 32.
    """
    count, height, width, _ = images.shape
    if height * width % 32:
      raise ValueError(
        "expected images whose entries are a multiple of 32, got"
        f" {height} x {width}."
      )
    x = images.reshape(count, height * width, 1)
    for channels in CHANNELS_1D[:-1]:
      x = nn.Conv(channels, (KERNEL_1D,), 2, padding=2, use_bias=False)(x)
      x = nn.relu(_normalised(self, x))
    return nn.Conv(CHANNELS_1D[-1], (KERNEL_1D,), 2, padding=2)(x)


class ConvolutionalDecoder(nn.Module):
  """The mirror of `ConvolutionalEncoder`, with tanh at its end.

  Attributes:
    train: whether batches are normalised by their own moments.
  """

  train: bool = False

  @nn.compact
  def __call__(
    self, latents: Float[Array, "n m 1"]
  ) -> Float[Array, "n 32*m 1 1"]:
    """The images of latents, as one column."""
    x = latents
    for channels in (*CHANNELS_1D[-2::-1], 1):
      last = channels == 1
      x = nn.ConvTranspose(
        channels, (KERNEL_1D,), (2,), padding=((2, 3),), use_bias=last
      )(x)
      x = jnp.tanh(x) if last else nn.relu(_normalised(self, x))
    return x[:, :, None]


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
