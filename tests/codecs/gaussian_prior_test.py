import numpy as np

from fedjax_llm.codecs import gaussian_prior

TREE = {
  "layers": {"a": np.zeros((3, 40, 50)), "b": np.zeros((3, 50, 20))},
  "head": np.zeros((60, 30)),
}
BLOCKS = gaussian_prior.blocks(TREE)


def test_a_block_is_a_layer_of_a_leaf():
  # In the order of the raveled tree: head, a of three layers, b of three.
  expected = [1800, *[2000] * 3, *[1000] * 3]
  assert np.bincount(BLOCKS).tolist() == expected
  assert (np.diff(BLOCKS) >= 0).all()


def test_moments_are_those_of_each_block():
  vectors = np.random.default_rng(0).normal(3, 2, (2, BLOCKS.size))
  told = gaussian_prior.moments(vectors, BLOCKS)
  for block in range(7):
    own = vectors[:, BLOCKS == block]
    np.testing.assert_allclose(told.mean[:, block], own.mean(1))
    np.testing.assert_allclose(told.square[:, block], (own**2).mean(1))


def test_samples_have_the_moments_of_all_clients():
  rng = np.random.default_rng(1)
  vectors = rng.normal(0, 1, (4, BLOCKS.size)) * (1e-4 * (1 + BLOCKS))
  vectors += 1e-3 * rng.normal(0, 1, (4, 7))[:, BLOCKS]
  told = gaussian_prior.moments(vectors, BLOCKS)
  drawn = gaussian_prior.draw(told, BLOCKS, 50, seed=0, round_number=3)
  assert (drawn.shape, drawn.dtype) == ((50, BLOCKS.size), np.float32)
  for block in range(7):
    own, got = vectors[:, BLOCKS == block], drawn[:, BLOCKS == block]
    # Five standard errors of 50,000 samples or more.
    bound = 5 * own.std() / np.sqrt(got.size)
    np.testing.assert_allclose(got.mean(), own.mean(), atol=bound)
    np.testing.assert_allclose(got.std(), own.std(), rtol=5 / np.sqrt(1e5))


def test_what_does_not_vary_is_drawn_as_it_is():
  # Variances that rounding makes negative must not be roots of that.
  vectors = np.full((3, BLOCKS.size), 0.1, np.float32)
  told = gaussian_prior.moments(vectors, BLOCKS)
  drawn = gaussian_prior.draw(told, BLOCKS, 2, seed=0, round_number=0)
  np.testing.assert_allclose(drawn, 0.1, rtol=1e-6)


def test_draws_are_of_the_seed_and_the_round():
  told = gaussian_prior.Moments(np.zeros((1, 7)), np.ones((1, 7)))
  of = lambda **which: gaussian_prior.draw(told, BLOCKS, 1, **which)
  first = of(seed=0, round_number=1)
  np.testing.assert_array_equal(first, of(seed=0, round_number=1))
  for other in (of(seed=0, round_number=2), of(seed=1, round_number=1)):
    assert (other != first).mean() > 0.99
