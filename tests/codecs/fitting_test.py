"""What a fit learns, what it detects, and that it resumes."""

import jax
import numpy as np
import pytest

from fedjax_llm.codecs import (
  autoencoder,
  fitting,
  layouts,
  networks,
  row_network,
)
from fedjax_llm.compression import base

CLIENTS, ROUNDS = 4, 12
NUMBERS = np.repeat(np.arange(ROUNDS), CLIENTS)
SIDE = 128
TREE = {"w": np.zeros((SIDE, SIDE), np.float32)}
IMAGE = layouts.flat(TREE)
# Rows of 64 entries: a signal along them is one of few directions.
SHORT = {"w": np.zeros(64 * 20, np.float32)}
ROWS = layouts.columns(SHORT, width=64)
NETWORK = row_network.network(64, latents=8, bits=2)
OPTIONS = dict(steps=300, rounds=NUMBERS, learning_rate=1e-2, held_out=0.25)


def smooth(height, width, scale):
  """Images of rank two, with coefficients of each client's own."""
  random = np.random.default_rng(0)
  waves = lambda n: np.sin(np.outer([1, 2], np.linspace(0, 4, n)))
  own = random.normal(size=(len(NUMBERS), 2))
  return scale * np.einsum("ck,kh,kw->chw", own, waves(height), waves(width))


def vectors(scale=1e-3):
  images = smooth(20, 64, scale)
  return images.swapaxes(1, 2).reshape(len(NUMBERS), -1).astype(np.float32)


def received(codec, vector):
  compressor = autoencoder.autoencoder(codec)
  state = compressor.init(vector)
  return base.transmit(compressor, vector, state, jax.random.key(0)).received


@pytest.fixture(scope="module")
def fitted():
  return fitting.fit(vectors(), ROWS, NETWORK, **OPTIONS)


def test_a_normalised_codec_learns_a_smooth_signal(fitted):
  codec, report = fitted
  error = report.codec.relative_squared_error
  assert error < 0.2
  for control in report.controls.values():
    assert error < 0.5 * control.relative_squared_error
  assert report.codec.innovation_cosine > 0.8
  assert report.codec.shuffled_error > 1.5 * error
  assert report.transmits and not report.warning
  # Eight latents of two bits for each row of 64, a scale and a header.
  np.testing.assert_allclose(report.bits, 8 * 2 / 64 + 0.11, atol=0.05)
  assert str(report.describe()).count("\n") == 5
  arrived = jax.jit(received)(codec, vectors()[-1])
  assert np.sum((arrived - vectors()[-1]) ** 2) < np.sum(vectors()[-1] ** 2) / 2


def test_what_is_fitted_to_a_multiple_sends_the_multiple(fitted):
  codec, report = fitted
  # A power of two, so that rounding is the same.
  other, same = fitting.fit(8 * vectors(), ROWS, NETWORK, **OPTIONS)
  np.testing.assert_allclose(other.scale, 8 * codec.scale, rtol=1e-6)
  vector = vectors()[-1]
  arrived = jax.jit(received)(codec, vector)
  multiple = jax.jit(received)(other, 8 * vector)
  np.testing.assert_allclose(multiple, 8 * arrived, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(same.codec, report.codec, rtol=1e-3)


def test_the_papers_network_without_normalisation_is_caught():
  images = smooth(SIDE, SIDE, 1e-4).reshape(len(NUMBERS), -1)
  _, report = fitting.fit(
    images.astype(np.float32),
    IMAGE,
    networks.resnet(),
    normalise="none",
    steps=10,
    batch_size=2,
    held_out=0.1,
    rounds=NUMBERS,
  )
  # Its tanh starts far above such entries, and cannot come down to them.
  assert report.codec.relative_squared_error > 10
  assert not report.transmits
  for text in ("transmits nothing", "constant_mean", 'normalise="columns"'):
    assert text in report.warning
  assert report.warning in report.describe()


@pytest.mark.parametrize(
  ("network", "steps"),
  [
    (networks.resnet(stem=8, linear=True), 60),
    (networks.convolutional(), 15),
  ],
  ids=["resnet_linear", "convolutional"],
)
def test_normalised_networks_of_images_begin_to_learn(network, steps):
  # Law 12: of entries as small, and after a few steps.
  images = smooth(64, 64, 1e-4).reshape(len(NUMBERS), -1).astype(np.float32)
  _, report = fitting.fit(
    images,
    layouts.flat({"w": np.zeros((64, 64), np.float32)}),
    network,
    normalise="one",
    steps=steps,
    learning_rate=3e-3,
    held_out=0.1,
    rounds=NUMBERS,
  )
  assert report.codec.relative_squared_error < 1
  assert report.codec.innovation_cosine > 0.15


def test_a_fit_that_was_stopped_goes_on_as_if_it_were_not(tmp_path):
  seen = []
  options = dict(OPTIONS, steps=12, evaluate_every=4)
  note = lambda step, loss, error: seen.append((step, loss, error))
  whole, _ = fitting.fit(vectors(), ROWS, NETWORK, progress=note, **options)
  once, seen = seen, []
  for steps in (4, 12):
    resumed, _ = fitting.fit(
      vectors(),
      ROWS,
      NETWORK,
      folder=tmp_path,
      progress=lambda *numbers: seen.append(numbers),
      **dict(options, steps=steps),
    )
  assert seen == once and [step for step, *_ in seen] == [4, 8, 12]
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  with pytest.raises(ValueError, match="checkpoints of another fit"):
    fitting.fit(vectors(), ROWS, NETWORK, folder=tmp_path, seed=1, **options)


@pytest.mark.parametrize("change", ["snapshots", "rounds"])
def test_a_fit_to_others_does_not_go_on(tmp_path, change):
  options = dict(OPTIONS, steps=4, evaluate_every=4, folder=tmp_path)
  fitting.fit(vectors(), ROWS, NETWORK, **options)
  others = vectors()
  if change == "snapshots":
    others = 3 * others[::-1]
  else:
    options["rounds"] = NUMBERS // 2
  with pytest.raises(ValueError, match="checkpoints of another fit"):
    fitting.fit(others, ROWS, NETWORK, **options)


def test_a_fit_that_gets_no_better_stops_and_returns_the_best():
  seen = []
  codec, report = fitting.fit(
    vectors(),
    ROWS,
    NETWORK,
    evaluate_every=2,
    patience=3,
    progress=lambda step, loss, error: seen.append(error),
    # So large that it soon gets worse.
    **dict(OPTIONS, learning_rate=0.3),
  )
  assert len(seen) < 100 and int(np.argmin(seen)) == len(seen) - 1 - 3
  best = report.codec.relative_squared_error
  np.testing.assert_allclose(best, min(seen), rtol=1e-5)


def test_batches_are_of_rounds_that_are_not_held_out():
  poisoned = vectors()
  poisoned[NUMBERS >= 9] = np.nan
  # Held-out rounds tell nothing, but training went on.
  losses = []
  fitting.fit(
    poisoned,
    ROWS,
    NETWORK,
    evaluate_every=1,
    progress=lambda step, loss, error: losses.append((loss, error)),
    **dict(OPTIONS, steps=2),
  )
  assert np.isfinite([loss for loss, _ in losses]).all()
  assert np.isnan([error for _, error in losses]).all()


def test_what_cannot_be_fitted_is_refused():
  with pytest.raises(ValueError, match=r"snapshots \[count, 1280\]"):
    fitting.fit(np.ones((4, 7), np.float32), ROWS)
  with pytest.raises(ValueError, match="Record more rounds"):
    fitting.fit(vectors()[:1], ROWS)
  with pytest.raises(ValueError, match="held_out=1"):
    fitting.fit(vectors(), ROWS, held_out=1)
  with pytest.raises(ValueError, match="normalise='batch'"):
    fitting.fit(vectors(), ROWS, normalise="batch")
  with pytest.raises(ValueError, match="steps=0"):
    fitting.fit(vectors(), ROWS, steps=0)
