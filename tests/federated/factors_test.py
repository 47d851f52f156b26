import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm.compression import quantize, wire
from fedjax_llm.federated import factors

RNG = np.random.default_rng(0)
LAYERS, INPUTS, OUTPUTS, RANK = 2, 5, 7, 3


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


TREE = {
  "layers": {"q": {"a": draw(2, 5, 3), "b": draw(2, 3, 7)}},
  "score": {"kernel": draw(4, 2), "bias": draw(2)},
  "top": {"a": draw(4, 3), "b": draw(3, 6)},
}
Q, TOP = ("layers", "q"), ("top",)


def test_pairs_are_found_wherever_they_are():
  found = factors.pairs(TREE)
  assert set(found) == {Q, TOP}
  assert found[Q].b is TREE["layers"]["q"]["b"]
  assert factors.rank(TREE) == 3
  with pytest.raises(ValueError, match="factors a and b, got only: w/a"):
    factors.pairs({"w": {"a": draw(2, 2)}})


def test_pairs_that_are_put_back_are_the_tree():
  again = factors.put(TREE, factors.pairs(TREE))
  jax.tree.map(np.testing.assert_array_equal, again, TREE)


def test_every_entry_is_of_its_column_of_a_and_row_of_b():
  owners = factors.entry_ranks(TREE)
  vector, unravel = ravel_pytree(TREE)
  assert owners.shape == vector.shape
  kept = unravel(jnp.where(owners < 2, vector, 0))
  expected = jax.tree.map(np.copy, TREE)
  for pair in (expected["layers"]["q"], expected["top"]):
    pair["a"][..., 2:], pair["b"][..., 2:, :] = 0, 0
  jax.tree.map(np.testing.assert_array_equal, kept, expected)
  assert (owners == -1).sum() == 4 * 2 + 2


def test_the_ranks_of_all_layers_have_numbers_of_their_own():
  owners, ranks = factors.rank_owners(TREE)
  assert ranks == [3, 3, 3]
  _, unravel = ravel_pytree(jax.tree.map(np.float32, TREE))
  numbers = unravel(jnp.asarray(owners, jnp.float32))
  # Two layers of `q`, then `top`.
  for start, pair in (
    (0, jax.tree.map(lambda x: x[0], numbers["layers"]["q"])),
    (3, jax.tree.map(lambda x: x[1], numbers["layers"]["q"])),
    (6, numbers["top"]),
  ):
    for rank in range(3):
      assert (pair["a"][:, rank] == start + rank).all()
      assert (pair["b"][rank] == start + rank).all()
  assert (numbers["score"]["kernel"] == -1).all()


def test_tiers_send_their_ranks_and_all_else():
  vector, unravel = ravel_pytree(TREE)
  tiers = factors.tiers(TREE, (1, 3), upload=quantize.cast(jnp.bfloat16))
  assert tiers.tier_of(np.arange(5)).tolist() == [0, 1, 0, 1, 0]
  heads, of_one = 4 * 2 + 2, 2 * (5 + 7) + 4 + 6
  for channel, rank in zip(tiers.channels, (1, 3), strict=True):
    down, _ = channel.download.encode(vector, (), jax.random.key(0))
    assert wire.entries(down) == heads + rank * of_one
    state = channel.upload.init(vector)
    up, _ = channel.upload.encode(vector, state, jax.random.key(0))
    assert wire.entries(up) == wire.entries(down)
    assert wire.nbytes(up) < 0.6 * wire.nbytes(down)
    received = unravel(channel.download.decode(down))
    assert not received["top"]["a"][:, rank:].any()
    np.testing.assert_array_equal(
      received["score"]["bias"], TREE["score"]["bias"]
    )
    np.testing.assert_array_equal(
      received["layers"]["q"]["b"][:, :rank], TREE["layers"]["q"]["b"][:, :rank]
    )


@pytest.mark.parametrize("ranks", [(), (0, 2), (1, 4)])
def test_ranks_that_the_adapter_does_not_have_are_refused(ranks):
  with pytest.raises(ValueError, match=r"ranks of tiers in \[1, 3\]"):
    factors.tiers(TREE, ranks)


def test_the_product_of_a_stack_is_the_weighted_sum_of_products():
  weights = np.array([0.5, 0, 0.3, 0.2], np.float32)
  clients = [jax.tree.map(lambda x: draw(*x.shape), TREE) for _ in weights]
  together = jax.tree.map(lambda *x: np.stack(x), *clients)
  stacks = factors.stacks(together, weights)
  assert stacks[Q].a.shape == (2, 5, 4 * 3)
  got = factors.products(stacks, 2.0)
  for layer in range(LAYERS):
    expected = np.zeros((INPUTS, OUTPUTS))
    for weight, client in zip(weights, clients, strict=True):
      pair = client["layers"]["q"]
      expected += 2 * weight * pair["a"][layer] @ pair["b"][layer]
    delta = got["layers"]["q"]["delta"][layer]
    np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-5)
  assert set(got) == {"layers", "top"}
  expected = sum(
    2 * w * x["top"]["a"] @ x["top"]["b"]
    for w, x in zip(weights, clients, strict=True)
  )
  np.testing.assert_allclose(
    got["top"]["delta"], expected, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("wide", [2, 3, 40])
def test_a_truncation_is_that_of_numpy_s_svd(wide):
  # Stacks of less rank than the matrices, and of more.
  pair = factors.Pair(draw(2, 5, wide), draw(2, wide, 7))
  got = jax.jit(factors.truncate, static_argnames="rank")(pair, rank=3)
  assert got.a.shape == (2, 5, 3)
  assert got.b.shape == (2, 3, 7)
  for layer in range(LAYERS):
    product = pair.a[layer].astype(float) @ pair.b[layer]
    u, s, v = np.linalg.svd(product)
    for rank in range(1, 4):
      expected = u[:, :rank] * s[:rank] @ v[:rank]
      nearest = got.a[layer, :, :rank] @ got.b[layer, :rank]
      np.testing.assert_allclose(nearest, expected, atol=1e-5 * s[0])
    # Beyond the rank of the product, singular values are rounding.
    real = min(3, wide)
    norms = np.linalg.norm(got.a[layer], axis=0)[:real]
    np.testing.assert_allclose(norms, np.ones(real), rtol=1e-4)


def test_layers_are_decomposed_one_by_one(equations):
  # Of several at once on two cores, a CPU's QRs can wait for each other.
  pair = factors.pairs(TREE)[Q]
  ranks_of_operands = [
    equation.invars[0].aval.ndim
    for equation in equations(lambda x: factors.truncate(x, 2), pair)
    if equation.primitive.name in ("qr", "svd")
  ]
  assert ranks_of_operands == [2] * 3


def test_a_truncation_does_not_hang_on_signs():
  pair = factors.Pair(draw(5, 3), draw(3, 7))
  turned = factors.Pair(-pair.a, -pair.b)
  got, expected = factors.truncate(pair, 2), factors.truncate(turned, 2)
  np.testing.assert_allclose(got.a, expected.a, atol=1e-5)
  assert all(column[np.abs(column).argmax()] > 0 for column in got.a.T)


def test_a_rank_larger_than_the_matrix_is_filled_with_zeros():
  pair = factors.Pair(draw(5, 3), draw(3, 2))
  got = factors.truncate(pair, 4)
  np.testing.assert_allclose(got.a @ got.b, pair.a @ pair.b, atol=1e-5)
  assert not got.a[:, 2:].any() and not got.b[2:].any()


def test_what_is_drawn_anew_starts_as_lora_does():
  pair = factors.Pair(jnp.ones((2, 400, 3)), jnp.ones((2, 3, 5)))
  a, b = factors.redraw(pair, jax.random.key(0))
  assert not b.any()
  assert 0.98 / 20 < jnp.abs(a).max() <= 1 / 20
  # The deviation of a uniform is bound / sqrt(3), here of 2400 numbers.
  assert a.std() == pytest.approx(1 / 20 / np.sqrt(3), rel=0.05)


def test_the_norm_of_a_product_is_that_of_all_its_layers():
  pair = factors.pairs(TREE)[Q]
  expected = np.sum(np.square(pair.a @ pair.b))
  np.testing.assert_allclose(factors.squared_norm(pair), expected, rtol=1e-5)
