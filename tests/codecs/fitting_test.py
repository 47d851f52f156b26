"""What a fit learns, what it detects, and that it resumes."""

import dataclasses

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
from fedjax_llm.experiments import checkpoints

CLIENTS, ROUNDS = 4, 12
NUMBERS = np.repeat(np.arange(ROUNDS), CLIENTS)
SIDE = 128
TREE = {"w": np.zeros((SIDE, SIDE), np.float32)}
IMAGE = layouts.flat(TREE)
# Rows of 64 entries: a signal along them is one of few directions.
SHORT = {"w": np.zeros(64 * 20, np.float32)}
ROWS = layouts.columns(SHORT, width=64)
NETWORK = row_network.network(64, latents=8, bits=2)
SETTINGS = fitting.Settings(steps=300, learning_rate=1e-2, held_out=0.25)


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


def fit(snapshots, rounds=NUMBERS, progress=None, keeper=None, **changes):
  """A fit of the network of rows."""
  return fitting.fit(
    snapshots,
    ROWS,
    NETWORK,
    dataclasses.replace(SETTINGS, **changes),
    rounds=rounds,
    progress=progress,
    checkpoints=keeper,
  )


@pytest.fixture(scope="module")
def fitted():
  return fit(vectors())


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
  other, same = fit(8 * vectors())
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
    fitting.Settings(steps=10, batch_size=2, normalise="none", held_out=0.1),
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
  # The entries are small, and a few steps are enough.
  images = smooth(64, 64, 1e-4).reshape(len(NUMBERS), -1).astype(np.float32)
  _, report = fitting.fit(
    images,
    layouts.flat({"w": np.zeros((64, 64), np.float32)}),
    network,
    fitting.Settings(
      steps=steps, normalise="one", learning_rate=3e-3, held_out=0.1
    ),
    rounds=NUMBERS,
  )
  assert report.codec.relative_squared_error < 1
  assert report.codec.innovation_cosine > 0.15


def test_a_fit_that_was_stopped_goes_on_as_if_it_were_not(tmp_path):
  once, seen = [], []
  short = dict(steps=12, evaluate_every=4)
  whole, _ = fit(vectors(), progress=lambda *x: once.append(x), **short)
  note = lambda *numbers: seen.append(numbers)
  for steps in (4, 12):
    with checkpoints.Checkpoints(tmp_path) as keeper:
      options = dict(short, steps=steps, keeper=keeper)
      resumed, _ = fit(vectors(), progress=note, **options)
  assert seen == once and [step for step, *_ in seen] == [4, 8, 12]
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.parametrize("change", ["snapshots", "rounds", "seed"])
def test_another_fit_does_not_go_on(tmp_path, change):
  options = dict(steps=4, evaluate_every=4)
  with checkpoints.Checkpoints(tmp_path) as keeper:
    fit(vectors(), keeper=keeper, **options)
    others = vectors()
    if change == "snapshots":
      others = 3 * others[::-1]
    else:
      options |= {"rounds": NUMBERS // 2} if change == "rounds" else {"seed": 1}
    with pytest.raises(ValueError, match="checkpoints of another fit"):
      fit(others, keeper=keeper, **options)


def test_a_fit_that_gets_no_better_stops_and_returns_the_best():
  seen = []
  codec, report = fit(
    vectors(),
    evaluate_every=2,
    patience=3,
    progress=lambda step, loss, error: seen.append(error),
    # So large that it soon gets worse.
    learning_rate=0.3,
  )
  assert len(seen) < 100 and int(np.argmin(seen)) == len(seen) - 1 - 3
  best = report.codec.relative_squared_error
  np.testing.assert_allclose(best, min(seen), rtol=1e-5)


def test_batches_are_of_rounds_that_are_not_held_out():
  poisoned = vectors()
  poisoned[NUMBERS >= 9] = np.nan
  # Held-out rounds tell nothing, but training went on.
  losses = []
  fit(
    poisoned,
    steps=2,
    evaluate_every=1,
    progress=lambda step, loss, error: losses.append((loss, error)),
  )
  assert np.isfinite([loss for loss, _ in losses]).all()
  assert np.isnan([error for _, error in losses]).all()


def test_what_cannot_be_fitted_is_refused():
  with pytest.raises(ValueError, match=r"snapshots \[count, 1280\]"):
    fit(np.ones((4, 7), np.float32))
  with pytest.raises(ValueError, match="Record more rounds"):
    fit(vectors()[:1], NUMBERS[:1])
  for change, message in (
    (dict(held_out=1), "held_out=1"),
    (dict(normalise="batch"), "normalise='batch'"),
    (dict(steps=0), "steps=0"),
    (dict(patience=0), "patience >= 1"),
  ):
    with pytest.raises(ValueError, match=message):
      fit(vectors(), **change)
