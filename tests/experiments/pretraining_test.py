"""Pre-training at toy size: it learns, resumes, and exports a model."""

import json
import pathlib

import jax
import numpy as np
import pytest
import transformers

from fedjax_llm.experiments import pretraining, runner
from fedjax_llm.models import decoder, pretrained

TEXTS = [" ".join(str(step * x) for x in range(150)) for step in range(1, 6)]
HELD_OUT = [" ".join(str(7 * x) for x in range(60))]
LENGTH = 24
SCHEDULE = {
  "steps": 12,
  "steps_per_round": 4,
  "batch_size": 4,
  "rows_at_once": 2,
  "learning_rate": 1e-2,
  "warmup": 2,
}


@pytest.fixture(scope="module")
def tokenizer():
  return pretraining.train_tokenizer(TEXTS, 280, LENGTH)


@pytest.fixture(scope="module")
def make(tokenizer):
  config = decoder.DecoderConfig(
    vocab_size=280,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
  )

  def fn(train=TEXTS, sequence_length=LENGTH, **changes):
    return pretraining.pretraining(
      config=config,
      tokenizer=tokenizer,
      train=train,
      held_out=HELD_OUT,
      sequence_length=sequence_length,
      schedule=pretraining.Schedule(**SCHEDULE | changes),
      data={"name": "counting"},
    )

  return fn


@pytest.fixture(scope="module")
def made(make):
  return make()


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("pretraining")
  runner.run(made, folder)
  return folder


def lines(folder):
  return runner.read_metrics(folder / "metrics.jsonl")


def test_training_lowers_the_loss_of_new_text(whole):
  first, *_, last = lines(whole)
  assert first["loss"] == pytest.approx(np.log(280), abs=0.1)
  assert last["loss"] < first["loss"] - 0.2
  assert last["tokens"] == 4 * 4 * LENGTH


def test_it_resumes_to_the_bit(made, whole, tmp_path):
  calls = []

  def dies(state, number):
    calls.append(number)
    if len(calls) == 3:
      raise InterruptedError
    return made.round(state, number)

  fields = {**vars(made), "checkpoint_every": 1}
  broken = runner.Experiment(**{**fields, "round": dies})
  with pytest.raises(InterruptedError):
    runner.run(broken, tmp_path, name=whole.name)
  runner.run(runner.Experiment(**fields), tmp_path, name=whole.name)
  strip = lambda line: {k: x for k, x in line.items() if k != "seconds"}
  assert list(map(strip, lines(tmp_path))) == list(map(strip, lines(whole)))
  weights = pathlib.Path("model", "model.safetensors")
  assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()


def test_the_exported_folder_loads_here_and_in_transformers(whole, tokenizer):
  config, params = pretrained.load(whole / "model")
  assert config.max_position_embeddings == LENGTH
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
  loaded = transformers.AutoTokenizer.from_pretrained(whole / "model")
  assert loaded(HELD_OUT)["input_ids"] == tokenizer(HELD_OUT)["input_ids"]
  assert loaded.model_max_length == LENGTH
  fields = json.loads((whole / "model" / "config.json").read_text())
  assert fields["model_type"] == "llama"


def test_texts_start_with_the_start_token_and_come_back(tokenizer):
  ids = tokenizer("é 日 12")["input_ids"]
  assert ids[0] == tokenizer.bos_token_id
  assert tokenizer.decode(ids, skip_special_tokens=True) == "é 日 12"


def test_accumulation_takes_the_step_of_the_whole_batch(make):
  # The last of the batch's rows is half padding: means must not be averaged.
  train = [" ".join(str(x) for x in range(56))]
  fields = {"steps": 2, "steps_per_round": 1, "warmup": 0}
  options = {"train": train, "batch_size": 4, **fields}
  expected = make(**options, rows_at_once=4)
  made = make(**options, rows_at_once=1)
  start = expected.init()
  state, metrics = made.round(start, 0)
  reference, wanted = expected.round(start, 0)
  loss = float(metrics["train_loss"])
  assert loss == pytest.approx(float(wanted["train_loss"]), rel=1e-6)
  # The first moments are a tenth of the clipped gradient. The parameters are
  # not compared: Adam's first step is the gradient's sign, noise where it is 0.
  for x, y in zip(
    jax.tree.leaves(state[1][1][0].mu),
    jax.tree.leaves(reference[1][1][0].mu),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, atol=1e-7)


def test_the_rate_warms_up_and_ends_at_a_tenth():
  optimizer = pretraining.Schedule(**SCHEDULE).optimizer()
  params = {"kernel": np.float32([[0.0]]), "scale": np.float32([1.0])}
  state, sizes = optimizer.init(params), []
  for _ in range(SCHEDULE["steps"] + 1):
    gradient = jax.tree.map(np.ones_like, params)
    updates, state = optimizer.update(gradient, state, params)
    sizes.append(-float(updates["scale"][0]))
  # Under a constant gradient Adam's step is the rate; scales do not decay.
  assert sizes[0] == 0
  assert np.argmax(sizes) == SCHEDULE["warmup"]
  assert max(sizes) == pytest.approx(1e-2, rel=1e-3)
  assert sizes[-1] == pytest.approx(1e-3, rel=1e-3)


def test_an_epoch_has_every_row_once():
  schedule = pretraining.Schedule(**SCHEDULE)
  rows = 16
  epochs = [pretraining._batches(rows, schedule, first) for first in (0, 4)]
  for indices in epochs:
    assert sorted(indices.ravel()) == list(range(rows))
  assert not np.array_equal(*epochs)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"steps": 13}, "steps_per_round to divide steps"),
    ({"rows_at_once": 3}, "rows_at_once to divide batch_size"),
    ({"rows_at_once": 0}, "rows_at_once >= 1"),
    ({"warmup": 12}, "warmup"),
    ({"warmup": -1}, "warmup"),
    ({"batch_size": 4000}, "at least 4000 rows"),
    ({"sequence_length": 25}, "sequence_length <= 24"),
  ],
)
def test_bad_knobs_are_refused(make, changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


def test_a_vocabulary_without_all_bytes_is_refused():
  with pytest.raises(ValueError, match="vocabulary >= 257"):
    pretraining.train_tokenizer(TEXTS, 256, LENGTH)
