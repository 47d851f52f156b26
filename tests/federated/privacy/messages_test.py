"""Noise before and after the encoder of a codec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import compression
from fedjax_llm.codecs import pca
from fedjax_llm.compression import wire
from fedjax_llm.federated.privacy import messages

KEY = jax.random.key(2)
N, K, CLIP, NOISE = 60, 8, 2.0, 0.7
SNAPSHOTS = np.random.default_rng(0).normal(size=(12, N)).astype(np.float32)
CODEC = pca.pca(pca.fit(jnp.asarray(SNAPSHOTS), K))
VECTOR = SNAPSHOTS[0]


def mechanism(noise_multiplier=NOISE, clip_norm=CLIP):
  return messages.gaussian_mechanism(
    clip_norm=clip_norm, noise_multiplier=noise_multiplier
  )


def payload_of(compressor, vector=VECTOR, key=KEY):
  return compressor.encode(vector, compressor.init(vector), key)[0]


def latent(payload):
  """The innermost values."""
  while hasattr(payload, "values"):
    payload = payload.values
  return np.asarray(payload)


def test_what_is_released_is_within_the_norm_before_noise():
  before = compression.chain(mechanism(0.0), CODEC)
  after = compression.chain(CODEC, mechanism(0.0))
  clipped = VECTOR * CLIP / np.linalg.norm(VECTOR)
  np.testing.assert_allclose(
    latent(payload_of(before)), latent(payload_of(CODEC, clipped)), atol=1e-5
  )
  code = latent(payload_of(CODEC))
  assert np.linalg.norm(code) > CLIP
  released = latent(payload_of(after))
  np.testing.assert_allclose(np.linalg.norm(released), CLIP, rtol=1e-5)
  np.testing.assert_allclose(
    released, code * CLIP / np.linalg.norm(code), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize(
  "compressor", [mechanism(), compression.chain(CODEC, mechanism())]
)
def test_the_noise_is_so_many_norms_in_every_entry_released(compressor):
  draws = 400
  keys = jax.random.split(KEY, draws)
  encode = jax.jit(jax.vmap(lambda key: payload_of(compressor, key=key)))
  released = latent(encode(keys))
  noise = released - released.mean(axis=0)[None]
  # Five standard deviations of that of a normal sample.
  spread = noise.std(axis=0, ddof=1) / (NOISE * CLIP)
  assert (abs(spread - 1) < 5 / np.sqrt(2 * draws)).all()
  correlation = np.corrcoef(noise.T) - np.eye(noise.shape[1])
  assert abs(correlation).max() < 5 / np.sqrt(draws)


def test_before_the_encoder_the_code_is_that_of_the_noisy_update():
  # So is all that is made of it: post-processing.
  chained = compression.chain(mechanism(), CODEC)
  payload = payload_of(chained)
  first_key, _ = jax.random.split(KEY)
  noisy = payload_of(mechanism(), key=first_key).values
  np.testing.assert_array_equal(
    latent(payload), latent(payload_of(CODEC, noisy))
  )


@pytest.mark.parametrize(
  "compressor",
  [
    compression.chain(mechanism(), CODEC),
    compression.chain(CODEC, mechanism()),
    compression.chain(CODEC, mechanism(), compression.stochastic_uniform(8)),
  ],
)
def test_the_receiver_decodes_the_message_and_knows_no_more(compressor):
  payload = payload_of(compressor)
  arrived = wire.loads(wire.dumps(payload))
  np.testing.assert_array_equal(
    compressor.decode(arrived), compressor.decode(payload)
  )
  other = payload_of(compressor, key=jax.random.key(3))
  assert wire.dumps(other) != wire.dumps(payload)


def test_what_is_not_finite_is_nothing_but_noise():
  broken = VECTOR.copy()
  broken[3] = np.nan
  zero = payload_of(mechanism(), np.zeros_like(VECTOR)).values
  np.testing.assert_array_equal(payload_of(mechanism(), broken).values, zero)


def test_what_is_narrow_is_sent_in_full():
  narrow = jnp.asarray(VECTOR, jnp.bfloat16)
  sent = payload_of(mechanism(0.0), narrow).values
  assert sent.dtype == jnp.float32
  assert np.linalg.norm(sent) <= CLIP * (1 + 1e-6)


def test_noise_without_a_bound_is_refused():
  with pytest.raises(ValueError, match="finite clip_norm"):
    mechanism(clip_norm=float("inf"))
  with pytest.raises(ValueError, match="noise_multiplier=-1"):
    mechanism(-1)
