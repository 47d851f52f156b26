"""Tasks at toy size: language models, classifiers, adapters to go on from."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

from fedjax_llm.cli import configs
from fedjax_llm.data import partition, records, templates
from fedjax_llm.experiments import finetuning, loading, tasks
from fedjax_llm.federated import clients
from fedjax_llm.federated.algorithms import fed_avg
from fedjax_llm.models import (
  adapters,
  bert,
  families,
  lora,
  pretrained,
  quantized,
)

datasets = pytest.importorskip("datasets")

TOY = configs.load(str(pathlib.Path(__file__).parent.parent / "toy_config.py"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path / "cache"))


def language_model(model, **changes):
  settings = {"adapter": lora.LoRA(rank=2), "sequence_length": 8} | changes
  return tasks.language_model(
    records.streams(TOY.corpus()), model=model, **settings
  )


def numbers(label):
  """Sixty texts of even or odd numbers, thirty of each."""
  rows = [
    {"text": f"{2 * n + odd} {2 * n + odd + 2}", "label": label(odd)}
    for n in range(30)
    for odd in (0, 1)
  ]
  return records.classified(
    datasets.Dataset.from_list(rows),
    templates.plain(),
    partition.iid(clients=3, seed=0),
    held_out=0.2,
  )


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
  with pytest.raises(ValueError, match="tokenizer"):
    loading.load_tokenizer(tmp_path)


def test_tokens_that_a_model_lacks_are_refused_where_they_occur(toy_model):
  config = families.read_config(toy_model)
  loading.check_tokens(np.array([[0, 299]]), config)
  with pytest.raises(ValueError, match="token 300, the model has only 300"):
    loading.check_tokens(np.array([[0, 300]]), config)


def test_the_base_model_is_kept_in_the_dtype_asked_for(toy_model):
  task = tasks.language_model(
    records.streams(TOY.corpus()),
    model=toy_model,
    adapter=lora.LoRA(rank=2),
    sequence_length=8,
    dtype="bfloat16",
  )
  dtypes = lambda tree: {leaf.dtype.name for leaf in jax.tree.leaves(tree)}
  assert dtypes(task.frozen) == {"bfloat16"}
  assert dtypes(task.trainable) == {"float32"}


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_the_layers_of_the_base_model_are_quantised_on_request(
  toy_model, format
):
  task = language_model(toy_model, quantize=format)
  kernel = task.frozen["layers"]["mlp"]["up_proj"]["kernel"]
  kind = {"int8": quantized.Int8, "nf4": quantized.NF4}[format]
  assert isinstance(kernel, kind)
  assert task.frozen["norm"]["scale"].dtype == jnp.float32
  assert np.isfinite(task.evaluate(task.trainable, task.frozen)["loss"])


def test_training_goes_on_from_an_adapter(toy_model, tmp_path):
  first = language_model(toy_model)
  moved = jax.tree.map(lambda x: x + 0.01, first.trainable)
  first.save_adapter(moved, tmp_path / "adapter")
  second = language_model(toy_model, adapter=tmp_path / "adapter")
  jax.tree.map(np.testing.assert_array_equal, second.trainable, moved)
  assert second.evaluate(second.trainable, second.frozen) == first.evaluate(
    moved, first.frozen
  )


def test_an_adapter_of_another_model_is_refused(toy_model, tmp_path):
  config = families.read_config(toy_model)
  deeper = type(config)(**{**vars(config), "num_hidden_layers": 3})
  settings = lora.LoRA(rank=2)
  factors = lora.init(families.model(deeper, settings), jax.random.key(0))
  adapters.save(tmp_path, factors, settings, config=deeper, base_model="x")
  with pytest.raises(
    ValueError, match="cannot place layer 2 of layers.self_attn"
  ):
    language_model(toy_model, adapter=tmp_path)


def test_packed_rows_are_learnt_from(toy_model):
  rows = [{"prompt": f"{n} ", "answer": f"{n + 1}"} for n in range(40)]
  source = records.instructions(
    datasets.Dataset.from_list(rows),
    lambda row: templates.Text(row["prompt"], row["answer"]),
    partition.iid(clients=2, seed=0),
    packing=True,
  )
  task = tasks.language_model(
    source, model=toy_model, adapter=lora.LoRA(rank=2), sequence_length=30
  )
  examples = task.population.examples
  assert examples.segments.max() > 1
  loss = jax.jit(task.loss_fn)
  real = np.ones(1, bool)
  row = jax.tree.map(lambda x: x[:1], examples)
  key = jax.random.key(0)
  whole, count = loss(task.trainable, task.frozen, row, real, key)
  # Each record of the row alone has the same loss as all of them together.
  alone = 0.0
  for number in range(1, row.segments.max() + 1):
    places = np.flatnonzero(row.segments[0] == number)
    tokens, mask = np.zeros_like(row.tokens), np.zeros_like(row.mask)
    tokens[0, : places.size] = row.tokens[0, places]
    mask[0, : places.size - 1] = row.mask[0, places[:-1]]
    segments = (np.arange(tokens.shape[1]) < places.size)[None].astype(np.int32)
    one = type(row)(tokens, mask, segments)
    alone += loss(task.trainable, task.frozen, one, real, key)[0]
  assert count == row.mask.sum()
  assert float(whole) == pytest.approx(float(alone), rel=1e-5)


def test_a_classifier_learns_with_its_head(tmp_path):
  task = tasks.classifier(
    numbers(lambda odd: ["even", "odd"][odd]),
    model=pretrained.SHIPPED,
    adapter=lora.LoRA(rank=2),
    sequence_length=12,
  )
  assert task.population.label_names == ("even", "odd")
  assert task.trainable["score"]["kernel"].shape == (128, 2)
  made = finetuning.fine_tuning(
    task,
    fed_avg.fed_avg(task.loss_fn, optax.sgd(0.01), optax.sgd(1.0)),
    finetuning.Schedule(
      rounds=8, clients_per_round=3, batch_size=8, local_epochs=2
    ),
  )
  state = made.init()
  before = made.evaluate(state)
  for number in range(8):
    state, _ = made.round(state, number)
  after = made.evaluate(state)
  assert after["loss"] < 0.8 * before["loss"]
  assert set(before) >= {"loss", "accuracy", "macro_f1"}
  made.export(state, tmp_path)
  config = families.read_config(pretrained.SHIPPED)
  _, trained = adapters.load(tmp_path / "adapter", config)
  jax.tree.map(
    np.testing.assert_array_equal, trained, jax.device_get(state.trainable)
  )


def test_texts_may_have_several_labels(toy_model):
  task = tasks.classifier(
    numbers(lambda odd: ["number", "odd"][: 1 + odd]),
    model=toy_model,
    adapter=lora.LoRA(rank=2),
    sequence_length=12,
  )
  result = task.evaluate(task.trainable, task.frozen)
  assert {"loss", "accuracy", "micro_f1"} <= set(result)


def test_an_encoder_is_no_language_model_but_classifies(toy_model, tmp_path):
  config = bert.BertConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=32,
  )
  model = bert.Bert(config, head=bert.heads.Classifier(2))
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))[
    "params"
  ]
  params.pop("classifier")
  tokenizer = loading.load_tokenizer(toy_model)
  tokenizer.save_pretrained(tmp_path / "bert")
  pretrained.save(tmp_path / "bert", config, params, dtype=jnp.float32)
  settings = lora.LoRA(rank=2, targets=("query", "value"))
  with pytest.raises(ValueError, match="predicts no tokens"):
    language_model(tmp_path / "bert", adapter=settings)
  task = tasks.classifier(
    numbers(lambda odd: odd),
    model=tmp_path / "bert",
    adapter=settings,
    sequence_length=12,
  )
  assert task.population.label_names == ("0", "1")
  assert np.isfinite(task.evaluate(task.trainable, task.frozen)["loss"])


def test_a_task_tells_which_adapter_it_went_on_from(toy_model, tmp_path):
  first = language_model(toy_model)
  assert "adapter_fingerprint" not in first.data
  first.save_adapter(first.trainable, tmp_path / "a")
  moved = jax.tree.map(lambda x: x + 0.01, first.trainable)
  first.save_adapter(moved, tmp_path / "b")
  prints = {
    language_model(toy_model, adapter=tmp_path / name).data[
      "adapter_fingerprint"
    ]
    for name in "ab"
  }
  assert len(prints) == 2


def test_labels_keep_their_names_and_kind(toy_model, tmp_path):
  task = tasks.classifier(
    numbers(lambda odd: ["number", "odd"][: 1 + odd]),
    model=toy_model,
    adapter=lora.LoRA(rank=2),
    sequence_length=12,
  )
  task.save_adapter(task.trainable, tmp_path)
  config = families.read_config(toy_model)
  _, trained = adapters.load(tmp_path, config)
  head = adapters.head_of(tmp_path, trained)
  assert head.names == ("number", "odd") and head.multi_label


def test_a_head_of_labels_in_another_order_is_refused(toy_model, tmp_path):
  config = families.read_config(toy_model)
  _, params = pretrained.load(toy_model)
  head = bert.heads.Classifier(2, names=("odd", "even"))
  params["score"] = {"kernel": jnp.ones((16, 2))}
  pretrained.save(tmp_path, config, params, head=head, dtype=jnp.float32)
  loading.load_tokenizer(toy_model).save_pretrained(tmp_path)
  source = numbers(lambda odd: ["even", "odd"][odd])
  settings = {"adapter": lora.LoRA(rank=2), "sequence_length": 12}
  with pytest.raises(ValueError, match="'odd', 'even'.*'even', 'odd'"):
    tasks.classifier(source, model=tmp_path, **settings)


def test_images_are_not_read_yet(tmp_path):
  config = families.vit.ViTConfig(
    hidden_size=12, intermediate_size=8, num_hidden_layers=1
  )
  (tmp_path / "config.json").write_text(json.dumps(config.to_hugging_face()))
  with pytest.raises(ValueError, match="no task reads images"):
    tasks.classifier(
      numbers(str), model=tmp_path, adapter=lora.LoRA(), sequence_length=4
    )


def test_full_fine_tuning_trains_all_parameters_in_float32(toy_model):
  full = language_model(toy_model, adapter=None, dtype="bfloat16")
  _, params = pretrained.load(toy_model)
  assert full.adapter is None and full.frozen == {}
  jax.tree.map(np.testing.assert_array_equal, full.trainable, params)
  adapted = language_model(toy_model, dtype="bfloat16")
  # Factors change nothing at the start.
  got = full.evaluate(full.trainable, full.frozen)["loss"]
  expected = adapted.evaluate(adapted.trainable, adapted.frozen)["loss"]
  assert got == pytest.approx(expected, rel=1e-3)  # Of bfloat16.


def test_quantised_kernels_are_not_trained(toy_model):
  with pytest.raises(ValueError, match="quantize='int8'. Leave it out, or"):
    language_model(toy_model, adapter=None, quantize="int8")


def test_a_classifier_that_is_fine_tuned_whole_is_loaded_whole(
  toy_model, tmp_path
):
  source = numbers(lambda odd: ["even", "odd"][odd])
  settings = {"model": toy_model, "sequence_length": 12, "seed": 3}
  full = tasks.classifier(source, adapter=None, **settings)
  adapted = tasks.classifier(source, adapter=lora.LoRA(rank=2), **settings)
  # Both start from the same new head.
  jax.tree.map(
    np.testing.assert_array_equal,
    full.trainable["score"],
    adapted.trainable["score"],
  )
  moved = jax.tree.map(lambda x: x + 0.01, full.trainable)
  full.save_adapter(moved, tmp_path / "model")
  again = tasks.classifier(
    source, adapter=None, **settings | {"model": tmp_path / "model"}
  )
  jax.tree.map(np.testing.assert_array_equal, again.trainable, moved)


@pytest.mark.oracle
def test_full_fine_tuning_is_federated_averaging_of_transformers_models(
  toy_model, tmp_path
):
  # A round of two clients, two steps of SGD each, done by torch: the model that
  # is exported has the mean of the parameters.
  torch = pytest.importorskip("torch")
  task = language_model(toy_model, adapter=None)
  algorithm = fed_avg.fed_avg(task.loss_fn, optax.sgd(0.5), optax.sgd(1.0))
  cohort = clients.Cohort(
    np.array([0, 1], np.int32),
    np.arange(8, dtype=np.int32).reshape(2, 2, 2),
    np.ones((2, 2, 2), bool),
    np.array([1, 3], np.float32),
  )
  examples = task.population.examples
  state, metrics = jax.jit(algorithm.round)(
    algorithm.init(task.trainable), {}, examples, cohort, jax.random.key(0)
  )
  task.save_adapter(state.trainable, tmp_path)
  assert metrics["upload_entries"][0] == sum(
    x.size for x in jax.tree.leaves(task.trainable)
  )

  def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32
    )

  def trained(indices):
    model = load(toy_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for rows in indices:
      tokens = torch.tensor(examples.tokens[rows]).long()
      mask = torch.tensor(examples.mask[rows])
      logits = model(tokens[:, :-1]).logits
      losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens[:, 1:], reduction="none"
      )
      optimizer.zero_grad()
      ((losses * mask).sum() / mask.sum()).backward()
      optimizer.step()
    return dict(model.named_parameters())

  first, second = (trained(indices) for indices in cohort.indices)
  start = dict(load(toy_model).named_parameters())
  got = dict(load(tmp_path).named_parameters())
  assert got.keys() == start.keys()
  for name, parameter in got.items():
    step = (first[name] + 3 * second[name]) / 4 - start[name]
    assert step.abs().max() > 1e-5, name
    # Float32 of numbers up to one, rounded twice.
    error = (parameter - start[name] - step).abs().max()
    assert error < 1e-3 * step.abs().max() + 2e-7, name
