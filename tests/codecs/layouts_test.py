import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fedjax_llm.codecs import layouts

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def shapes(layers, width, rank, **outputs):
  """LoRA factors of stacked layers."""
  of = lambda *shape: jax.ShapeDtypeStruct((layers, *shape), np.float32)
  factors = {
    name: {"a": of(width, rank), "b": of(rank, outputs.get(name, width))}
    for name in MODULES
  }
  return {"layers": {"self_attn": factors}}


def filled(tree):
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: random.normal(size=x.shape).astype(np.float32), tree
  )


def test_llama_7b_is_the_papers_image():
  layout = layouts.square(shapes(32, 4096, 8))
  assert layout.positions.shape == (4096, 2048)
  assert layout.size == layout.positions.size == 8_388_608


@pytest.mark.parametrize(("layers", "rank"), [(1, 8), (3, 16)])
def test_an_image_is_as_wide_as_the_factors_together(layers, rank):
  layout = layouts.square(shapes(layers, 64, rank))
  assert layout.positions.shape == (64, 2 * 4 * layers * rank)


def test_columns_are_layer_by_layer_a_beside_b_transposed():
  tree = filled(shapes(2, 64, 4))
  vector, _ = ravel_pytree(tree)
  image = layouts.square(tree).pack(vector)
  factors = tree["layers"]["self_attn"]
  expected = []
  for layer in range(2):
    for module in MODULES:
      expected.append(factors[module]["a"][layer])
      expected.append(factors[module]["b"][layer].T)
  np.testing.assert_array_equal(image, np.concatenate(expected, axis=1))


@pytest.mark.parametrize(
  ("arrange", "tree"),
  [
    (layouts.square, shapes(2, 64, 4)),
    (layouts.square, shapes(3, 96, 8)),
    *(
      (layouts.square, shapes(1, side, rank))
      for side in (768, 2048, 4096)
      for rank in (8, 16)
    ),
    (layouts.flat, shapes(2, 64, 4, k_proj=16, v_proj=16)),
    (layouts.flat, {"c_attn": np.zeros((7, 3)), "head": np.zeros(5)}),
  ],
)
def test_what_is_packed_comes_back_to_the_bit(arrange, tree):
  vector, _ = ravel_pytree(filled(tree))
  layout = arrange(tree)
  image = jax.jit(layout.pack)(vector)
  assert image.shape == layout.positions.shape
  np.testing.assert_array_equal(jax.jit(layout.unpack)(image), vector)
  padding = np.asarray(image)[layout.positions == layout.size]
  assert padding.size == image.size - vector.size and not padding.any()


def test_a_flat_image_has_sides_that_are_multiples_of_64():
  tree = np.zeros(100_000)
  image = layouts.flat(tree).positions
  assert image.shape == (320, 320)
  assert image.size - 64 * image.shape[0] < 100_000


def test_the_digest_tells_layouts_apart_but_not_orders_of_keys():
  tree = shapes(2, 64, 4)
  inner = tree["layers"]["self_attn"]
  turned = {"layers": {"self_attn": dict(reversed(inner.items()))}}
  digest = layouts.square(tree).digest
  assert layouts.square(turned).digest == digest
  renamed = {"blocks": tree["layers"]}
  others = [
    layouts.flat(tree),
    layouts.square(renamed),
    layouts.square(shapes(2, 64, 8)),
    layouts.square(shapes(4, 64, 2)),
    layouts.square(tree, MODULES[::-1]),
  ]
  assert len({digest, *(x.digest for x in others)}) == 6


def test_another_layout_is_refused():
  layout = layouts.square(shapes(2, 64, 4))
  with pytest.raises(ValueError, match="a vector of 4096 entries, got"):
    layout.pack(np.zeros(8192))
  with pytest.raises(ValueError, match=r"image of \(64, 64\), got \(64, 32\)"):
    layout.unpack(np.zeros((64, 32)))


def test_what_is_not_square_is_told_to_be_flat():
  grouped = shapes(2, 64, 4, k_proj=16)
  with pytest.raises(ValueError, match=r"\[\(2, 16\), \(2, 64\)\]. Take"):
    layouts.square(grouped)
  with pytest.raises(ValueError, match="both factors of q_proj, v_proj, got"):
    layouts.square(grouped, ("q_proj", "v_proj"))
  head = {**grouped, "head": np.zeros((3, 3))}
  with pytest.raises(ValueError, match="LoRA factors alone, got head"):
    layouts.square(head)
  half = {"q_proj": {"b": np.zeros((2, 4, 64))}}
  with pytest.raises(ValueError, match=r"but only one of \['q_proj'\]"):
    layouts.square(half, ("q_proj",))
  twice = {str(i): {"q_proj": {"a": np.zeros((64, 4))}} for i in range(2)}
  with pytest.raises(ValueError, match="stacked layers, got q_proj/a twice"):
    layouts.square(twice, ("q_proj",))


def test_a_small_tree_has_an_image_that_the_networks_take():
  assert layouts.flat(np.zeros(5)).positions.shape == (128, 128)


def test_columns_are_stretches_of_the_raveled_tree():
  tree = filled(shapes(2, 6, 3, k_proj=4))
  vector, _ = ravel_pytree(tree)
  layout = layouts.columns(tree, width=7)
  height = -(-vector.size // 7)
  padded = np.pad(vector, (0, 7 * height - vector.size))
  image = layout.pack(vector)
  np.testing.assert_array_equal(image, padded.reshape(7, height).T)
  np.testing.assert_array_equal(layout.unpack(image), vector)
  assert not layout.is_learned


def test_ranked_columns_are_of_rising_energy_and_keep_their_order():
  tree = {"w": np.zeros(50, np.float32)}
  energies = np.random.default_rng(0).permutation(50) / 50
  layout = layouts.ranked(tree, energies, width=7)
  columns = [x[x < 50] for x in layout.positions.T]
  assert sorted(np.concatenate(columns)) == list(range(50))
  for column in columns:
    assert (np.diff(column) > 0).all()
  for before, after in zip(columns[:-1], columns[1:], strict=True):
    assert not len(after) or energies[before].max() < energies[after].min()
  vector = np.arange(50, dtype=np.float32)
  received = layout.unpack(layout.pack(vector))
  np.testing.assert_array_equal(received, vector)
  assert layout.is_learned
  assert layout != layouts.columns(tree, width=7)
  same = layouts.ranked(tree, energies, width=7)
  assert layout == same and hash(layout) == hash(same)


def test_images_of_no_width_and_energies_of_another_tree_are_refused():
  tree = {"w": np.zeros(50, np.float32)}
  with pytest.raises(ValueError, match="width >= 1, got width=0"):
    layouts.columns(tree, width=0)
  with pytest.raises(ValueError, match=r"50 entries, got \(49,\)"):
    layouts.ranked(tree, np.ones(49), width=4)
