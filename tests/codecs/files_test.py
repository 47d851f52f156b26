"""A codec of either kind is read as it was written, for its adapter alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.codecs import (
  autoencoder,
  files,
  layouts,
  networks,
  row_network,
  transforms,
)
from fedjax_llm.compression import base, wire

KEY = jax.random.key(0)
# Sides of 40 are too long to be rotated.
TREE = {"a": np.zeros((2, 40, 8)), "b": np.zeros((2, 8, 40))}
SIZE = 2 * 2 * 40 * 8
RANDOM = np.random.default_rng(0)
SNAPSHOTS = RANDOM.normal(size=(5, SIZE)).astype(np.float32)
ABOUT = {"representation": "delta", "share": 0.3}


def fitted(network, layout):
  """A codec of random variables."""
  variables = autoencoder.init(network, layout, KEY)
  return autoencoder.Codec(layout, network, jnp.full(1, 0.1), **variables)


CODECS = {
  "transform": lambda: transforms.fit(SNAPSHOTS, TREE),
  "resnet": lambda: fitted(networks.resnet(stem=2), layouts.flat(TREE)),
  "one-dimensional": lambda: fitted(
    networks.convolutional(bits=3), layouts.columns(TREE, width=32)
  ),
  "rows": lambda: fitted(
    row_network.network(16, latents=8),
    layouts.ranked(TREE, np.arange(SIZE) % 7, width=16),
  ),
}


@pytest.fixture(scope="module", params=CODECS)
def codec(request):
  return CODECS[request.param]()


def compressor(codec):
  if isinstance(codec, transforms.Transform):
    return transforms.to_principal_axes(codec)
  return autoencoder.autoencoder(codec)


def test_a_codec_is_read_as_it_was_written(codec, tmp_path):
  files.save(tmp_path, codec, ABOUT)
  found, about = files.load(tmp_path, TREE)
  assert jax.tree.structure(found) == jax.tree.structure(codec)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(codec), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)
  assert len(about.pop("fingerprint")) == 16
  assert about == ABOUT
  messages = []
  for each in (codec, found):
    end = compressor(each)
    state = end.init(SNAPSHOTS[0])
    sent = jax.jit(base.transmit, static_argnums=0)(
      end, SNAPSHOTS[0], state, KEY
    )
    messages.append((wire.dumps(sent.payload), np.asarray(sent.received)))
  assert messages[0][0] == messages[1][0]
  np.testing.assert_array_equal(messages[0][1], messages[1][1])
  if not isinstance(codec, transforms.Transform):
    assert found.layout.is_learned == codec.layout.is_learned
    assert autoencoder.setup_bytes(found) == autoencoder.setup_bytes(codec)


def test_a_codec_of_another_adapter_or_release_is_refused(codec, tmp_path):
  with pytest.raises(ValueError, match="got .*No such file.*run tgap"):
    files.load(tmp_path, TREE)
  files.save(tmp_path, codec, ABOUT)
  renamed = {"c": TREE["a"], "b": TREE["b"]}
  # As many entries, but other ones.
  turned = {"a": TREE["b"], "b": TREE["a"]}
  for other in ({"a": TREE["a"]}, renamed, turned):
    with pytest.raises(ValueError, match="adapter of other layers or shapes"):
      files.load(tmp_path, other)
  path = tmp_path / "codec.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "version": 7}))
  with pytest.raises(ValueError, match="has version 7"):
    files.load(tmp_path, TREE)
  path.write_text("{")
  with pytest.raises(ValueError, match="expected a codec in"):
    files.load(tmp_path, TREE)


def test_a_fingerprint_is_of_the_arrays(tmp_path):
  prints = []
  for number, snapshots in enumerate((SNAPSHOTS, SNAPSHOTS, SNAPSHOTS[1:])):
    folder = tmp_path / str(number)
    files.save(folder, transforms.fit(snapshots, TREE), {"number": number})
    prints.append(files.load(folder, TREE)[1]["fingerprint"])
  assert prints[0] == prints[1] != prints[2]


def test_what_a_report_warned_of_is_told_again(tmp_path, capsys):
  codec = CODECS["transform"]()
  files.save(tmp_path, codec, {"warning": ""})
  files.load(tmp_path, TREE)
  assert not capsys.readouterr().out
  files.save(tmp_path, codec, {"warning": "it transmits nothing."})
  files.load(tmp_path, TREE)
  told = capsys.readouterr().out
  assert told == f"warning: {tmp_path}: it transmits nothing.\n"
