import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm.models import (
  decoder,
  heads,
  lora,
  pretrained,
  quantized,
  tensor_files,
)


@pytest.fixture
def folder(config, base_params, tmp_path):
  pretrained.save(tmp_path, config, base_params(config), dtype=jnp.float32)
  return tmp_path


def edit(folder, change):
  """Rewrites the weights with what `change` makes of the tensors."""
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


def split(folder):
  """Two shards with an index, as the hub has them."""
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  path.unlink()
  weight_map = {}
  for i, name in enumerate(sorted(tensors)):
    weight_map[name] = f"model-0000{i % 2 + 1}-of-00002.safetensors"
  for file in set(weight_map.values()):
    part = {name: tensors[name] for name in tensors if weight_map[name] == file}
    safetensors.numpy.save_file(part, folder / file)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def equal(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


def test_what_is_saved_is_loaded(variant, base_params, tmp_path):
  params = base_params(variant)
  pretrained.save(tmp_path / "new", variant, params, dtype=jnp.float32)
  config, loaded = pretrained.load(tmp_path / "new")
  assert config == variant
  equal(loaded, params)


def test_the_fingerprint_is_that_of_the_config_and_weights_in_any_folder(
  folder, tmp_path_factory
):
  copy = tmp_path_factory.mktemp("elsewhere") / "copy"
  shutil.copytree(folder, copy)
  before = pretrained.fingerprint(folder)
  assert pretrained.fingerprint(copy) == before
  edit(copy, lambda tensors: tensors["model.norm.weight"].__iadd__(1))
  assert pretrained.fingerprint(copy) != before


def test_the_fingerprint_does_not_depend_on_the_order_of_the_directory(
  tmp_path, monkeypatch
):
  for name in ("config.json", "adapter_config.json", "tokenizer.json"):
    (tmp_path / name).write_text(name)
  before = pretrained.fingerprint(tmp_path)
  glob = pathlib.Path.glob
  backwards = lambda self, pattern: reversed([*glob(self, pattern)])
  monkeypatch.setattr(pathlib.Path, "glob", backwards)
  assert pretrained.fingerprint(tmp_path) == before


@pytest.mark.parametrize(
  "name",
  [
    "config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
  ],
)
def test_the_fingerprint_covers_every_file_that_decides_the_result(
  tmp_path, name
):
  (tmp_path / "config.json").write_text("{}")
  prints = {pretrained.fingerprint(tmp_path)}
  for content in ("one", "two"):
    (tmp_path / name).write_text(content)
    prints.add(pretrained.fingerprint(tmp_path))
  assert len(prints) == 3


def test_the_fingerprint_covers_names(tmp_path):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.safetensors").write_text("same")
  prints = [pretrained.fingerprint(tmp_path / name) for name in ("a", "b")]
  assert prints[0] != prints[1]


@pytest.mark.parametrize(
  "name",
  [
    "generation_config.json",
    "README.md",
    "trainer_state.json",
    "consolidated.safetensors",
  ],
)
def test_the_fingerprint_leaves_out_files_that_are_not_loaded(tmp_path, name):
  (tmp_path / "config.json").write_text("{}")
  before = pretrained.fingerprint(tmp_path)
  (tmp_path / name).write_text("other")
  assert pretrained.fingerprint(tmp_path) == before


def test_tensors_have_the_names_and_layout_of_hugging_face(
  folder, config, base_params
):
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  kernel = base_params(config)["layers"]["mlp"]["up_proj"]["kernel"]
  name = "model.layers.1.mlp.up_proj.weight"
  np.testing.assert_array_equal(tensors[name], kernel[1].T)
  assert {"model.embed_tokens.weight", "model.norm.weight"} < set(tensors)
  assert tensors["lm_head.weight"].shape == (96, 24)


def test_the_type_of_parameters_is_chosen(folder):
  _, params = pretrained.load(folder, dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_weights_are_stored_in_bfloat16_unless_told(
  config, base_params, tmp_path
):
  params = base_params(config)
  pretrained.save(tmp_path, config, params)
  _, loaded = pretrained.load(tmp_path)
  rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
  equal(loaded, jax.tree.map(rounded, params))
  assert json.loads((tmp_path / "config.json").read_text())["dtype"] == (
    "bfloat16"
  )


def test_shards_are_put_together(folder, config, base_params):
  split(folder)
  equal(pretrained.load(folder)[1], base_params(config))


def test_a_missing_shard_is_named(folder):
  split(folder)
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(ValueError, match=r"missing \['model-00002-of"):
    pretrained.load(folder)


def test_everything_that_does_not_fit_is_listed_at_once(folder):
  def change(tensors):
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 24))
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 40))

  edit(folder, change)
  with pytest.raises(ValueError) as error:
    pretrained.load(folder)
  assert str(error.value).splitlines()[1:] == [
    "  missing model.layers.1.self_attn.k_proj.weight",
    "  missing model.norm.weight",
    "  model.layers.0.mlp.up_proj.weight has shape (24, 40), not (40, 24)",
    "  unexpected model.layers.2.mlp.up_proj.weight",
  ]


def test_biases_that_the_config_does_not_tell_of_are_refused(folder):
  name = "model.layers.0.mlp.up_proj.bias"
  edit(folder, lambda tensors: tensors.update({name: np.zeros(40)}))
  with pytest.raises(ValueError, match=f"unexpected {name}"):
    pretrained.load(folder)


def test_buffers_of_old_checkpoints_are_passed_over(
  folder, config, base_params
):
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  edit(folder, lambda tensors: tensors.update({name: np.zeros(3)}))
  equal(pretrained.load(folder)[1], base_params(config))


def test_a_tied_model_may_store_its_output_matrix_again(
  tmp_path, config, base_params
):
  tied = dataclasses.replace(config, tie_word_embeddings=True)
  params = base_params(tied)
  pretrained.save(tmp_path, tied, params, dtype=jnp.float32)
  output = np.array(params["embed_tokens"]["embedding"])
  edit(tmp_path, lambda x: x.update({"lm_head.weight": output}))
  equal(pretrained.load(tmp_path)[1], params)
  # transformers would not tie it then.
  edit(tmp_path, lambda x: x.update({"lm_head.weight": output + 1}))
  with pytest.raises(ValueError, match="Set tie_word_embeddings to false"):
    pretrained.load(tmp_path)


def test_an_untied_model_needs_its_output_matrix(folder):
  edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
  with pytest.raises(ValueError, match="missing lm_head.weight"):
    pretrained.load(folder)


@pytest.mark.parametrize(
  "file, content, named",
  [
    ("config.json", None, "found none"),
    ("config.json", "{", "config.json"),
    ("config.json", '{"model_type": "t5"}', "config.json.*llama.*'t5'"),
    ("model.safetensors", None, "Only safetensors"),
    ("model.safetensors", "version https://git-lfs", "a safetensors file at"),
  ],
)
def test_a_broken_folder_is_refused(folder, file, content, named):
  (folder / file).unlink()
  if content is not None:
    (folder / file).write_text(content)
  with pytest.raises(ValueError, match=named):
    pretrained.load(folder)


def test_a_model_is_loaded_straight_into_its_places(
  folder, config, base_params
):
  mesh = jax.make_mesh((2,), ("x",))
  sharding = jax.sharding.NamedSharding(mesh, jax.P(None))
  _, params = pretrained.load(folder, sharding=sharding)
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
  equal(params, base_params(config))


def test_devices_read_no_more_than_their_part(config, base_params, tmp_path):
  even = dataclasses.replace(config, num_hidden_layers=4)
  pretrained.save(tmp_path, even, base_params(even), dtype=jnp.float32)
  sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.P("x"))
  _, params = pretrained.load(tmp_path, sharding=sharding)
  kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 24, 40)
  equal(params, base_params(even))


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_kernels_of_the_layers_are_quantised_on_request(
  folder, config, base_params, format
):
  _, params = pretrained.load(folder, quantize=format)
  is_kernel = lambda path: path[0].key == "layers" and path[-1].key == "kernel"
  expected = jax.tree.map_with_path(
    lambda path, x: quantized.quantize(x, format) if is_kernel(path) else x,
    base_params(config),
  )
  equal(params, expected)


def test_large_models_are_saved_in_shards(
  config, base_params, tmp_path, monkeypatch
):
  monkeypatch.setattr(tensor_files, "_SHARD_BYTES", 9_000)
  pretrained.save(tmp_path, config, base_params(config), dtype=jnp.float32)
  files = sorted(x.name for x in tmp_path.glob("*.safetensors"))
  assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
  equal(pretrained.load(tmp_path)[1], base_params(config))


def test_what_is_beside_the_weights_of_a_base_model_is_kept(
  folder, config, base_params, tmp_path
):
  path = folder / "config.json"
  fields = json.loads(path.read_text()) | {"eos_token_id": 7}
  path.write_text(json.dumps(fields))
  (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
  new = tmp_path / "new"
  pretrained.save(new, config, base_params(config), like=folder)
  assert json.loads((new / "config.json").read_text()) == fields | {
    "dtype": "bfloat16"
  }
  kept = (new / "generation_config.json").read_text()
  assert kept == '{"eos_token_id": [7, 8]}'


def test_a_classifier_begins_with_the_head_of_its_checkpoint(
  config, base_params, tmp_path
):
  head, adapter = heads.Classifier(3), lora.LoRA(2)
  params = base_params(config)
  params.pop("lm_head")
  kernel = jax.random.normal(jax.random.key(0), (24, 3))
  params["score"] = {"kernel": kernel}
  pretrained.save(tmp_path, config, params, head=head, dtype=jnp.float32)
  _, loaded = pretrained.load(tmp_path, head=head)
  model = decoder.Decoder(config, adapter, head)
  trained = lora.init(model, jax.random.key(1), loaded)
  np.testing.assert_array_equal(trained["score"]["kernel"], kernel)
  # One of another number of labels is trained anew.
  _, without = pretrained.load(tmp_path, head=heads.Classifier(4))
  assert "score" not in without


def test_a_classifier_of_a_language_model_begins_with_a_drawn_head(folder):
  head = heads.Classifier(3)
  config, loaded = pretrained.load(folder, head=head)
  assert "score" not in loaded and "lm_head" not in loaded
  model = decoder.Decoder(config, lora.LoRA(2), head)
  trained = lora.init(model, jax.random.key(1), loaded)
  assert trained["score"]["kernel"].shape == (24, 3)
  assert jnp.abs(trained["score"]["kernel"]).max() > 0


HUB = """
import sys
from fedjax_llm.models import pretrained
config, params = pretrained.load("someone/tiny-llama")
print(pretrained.resolve("someone/tiny-llama").name, config.hidden_size)
assert not {"torch", "peft"} & set(sys.modules)
for name in ("someone/unknown", "no/such/folder", "unknown"):
  try:
    pretrained.load(name)
  except ValueError as error:
    assert repr(name) in str(error), error
    print("refused", name)
"""


def test_a_hub_name_is_read_from_the_cache_without_torch(folder, tmp_path):
  revision = "0123456789abcdef0123456789abcdef01234567"
  repository = tmp_path / "cache" / "models--someone--tiny-llama"
  snapshot = repository / "snapshots" / revision
  snapshot.mkdir(parents=True)
  (repository / "refs").mkdir()
  (repository / "refs" / "main").write_text(revision)
  split(folder)
  for path in folder.iterdir():
    if path.is_file():
      shutil.copy(path, snapshot)
  done = subprocess.run(
    [sys.executable, "-c", HUB],
    env=os.environ
    | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    f"{revision} 24",
    "refused someone/unknown",
    "refused no/such/folder",
    "refused unknown",
  ]


PEAK = """
import pathlib
import sys
import threading
import jax
from fedjax_llm.models import pretrained

def anonymous():
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(status.split("RssAnon:")[1].split()[0])

def watch():
  while not is_done.wait(0.001):
    samples.append(anonymous())

jax.block_until_ready(jax.device_put(1.0))
samples, is_done = [anonymous()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
_, params = pretrained.load(
  sys.argv[1], dtype="bfloat16", quantize=sys.argv[2] or None
)
is_done.set()
watcher.join()
print(sum(x.nbytes for x in jax.tree.leaves(params)), max(samples) - samples[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("format", ["", "nf4"])
def test_host_memory_holds_the_model_and_about_one_stacked_parameter(
  config, tmp_path, monkeypatch, format
):
  monkeypatch.setattr(tensor_files, "_SHARD_BYTES", 20_000_000)
  large = dataclasses.replace(
    config,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
  )
  shapes = lora.abstract_variables(decoder.Decoder(large))["params"]
  ones = jax.tree.map(lambda x: np.ones(x.shape, jnp.bfloat16), shapes)
  pretrained.save(tmp_path, large, ones)
  sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
  assert len(sizes) > 4 and sum(sizes) > 100_000_000
  done = subprocess.run(
    [sys.executable, "-c", PEAK, tmp_path, format],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  held, peak = map(int, done.stdout.split())
  # Stacked, a kernel of the feed-forward block is a fourth of the model.
  assert held < peak < 1.5 * sum(sizes)
