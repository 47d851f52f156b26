"""Every shipped config runs for two rounds at toy size."""

import dataclasses
import inspect
import json
import pathlib
import re

import pytest
import tyro

from fedjax_llm.cli import configs
from fedjax_llm.cli import run as commands
from fedjax_llm.models import pretrained
from tests import flat

CONFIGS = sorted(path.stem for path in configs.folder().glob("*.py"))
FEDERATED = {
  "rounds": 2,
  "clients_per_round": 2,
  "rank": 2,
  "local_steps": 1,
  "batch_size": 2,
  "sequence_length": 16,
  "held_out_rows": 1,
}
PRETRAINING = {
  "steps": 2,
  "steps_per_round": 1,
  "batch_size": 2,
  "rows_at_once": 1,
  "sequence_length": 16,
  "warmup": 1,
  "vocabulary": 300,
  "hidden_size": 64,
  "layers": 1,
}

# Its transform is what `cg_fedllm` goes through.
TGAP = {"codec": "rows", "fit_steps": 2, "fit_batch_size": 2}

# Of the configs on data sets: little enough of them, and rows long enough.
DATA = {
  "flasc_dolly": {
    "data": "dolly15k_fed10/local_training_*.json",
    "held_out": "dolly15k_fed10/global_test.json",
    "sequence_length": 255,
  },
  "flasc_gsm8k": {"data": "gsm8k", "clients": 4, "sequence_length": 128},
  "flasc_newsgroups": {
    "data": "20news_bydate/20news-bydate.tar.gz",
    "clients": 20,
  },
  "flasc_shakespeare": {
    "model": "stories260k",
    "text": "tinyshakespeare/input.txt",
  },
  "minilm_newsgroups": {
    "data": "20news_bydate/20news-bydate.tar.gz",
    "clients": 20,
  },
  "smollm2_dolly": {
    "data": "dolly15k_fed10/local_training_*.json",
    "held_out": "dolly15k_fed10/global_test.json",
    "sequence_length": 128,
  },
  "smollm2_shakespeare": {"text": "tinyshakespeare/input.txt"},
}
# Of the configs on real models.
MODELS = {
  "minilm_newsgroups": "minilm-l6",
  "smollm2_dolly": "smollm2-135m",
  "smollm2_shakespeare": "smollm2-135m",
}


@pytest.fixture(params=CONFIGS)
def config(request):
  return configs.load(request.param)


def test_it_runs_for_two_rounds(config, tmp_path, request):
  name = pathlib.Path(config.__file__).stem
  assert pretrained.SHIPPED.is_dir(), "the shipped model is not built yet"
  toy = PRETRAINING if name == "pretrain" else FEDERATED
  if name in DATA:
    data = request.getfixturevalue("data")
    paths = ("model", "text", "data", "held_out")
    toy = toy | {
      knob: str(data / value) if knob in paths else value
      for knob, value in DATA[name].items()
    }
  if name in MODELS:
    models = request.getfixturevalue("models")
    toy = toy | {"model": str(models / MODELS[name])}
  if name == "tgap":
    toy = toy | TGAP
  if name == "cg_fedllm":
    # Two commands: the other one first.
    made = configs.load("tgap").experiment
    out = tmp_path / "tgap"
    commands.run(made, out, name="toy", knobs=flat.grouped(made, **toy))
    toy = toy | {"codec": str(out / "codec")}
    for knobs, message in (
      (dict(unbiased=True, error_feedback=True), "Leave --unbiased out"),
      (dict(sequence_length=toy["sequence_length"] // 2), "rows of another"),
      (dict(error_feedback=True, refit_every=1), "got.*refit_every=1"),
      (dict(representation="state"), "was fitted to the delta"),
    ):
      with pytest.raises(ValueError, match=message):
        config.experiment(**flat.grouped(config.experiment, **toy | knobs))
  arguments = flat.grouped(config.experiment, **toy)
  commands.run(config.experiment, tmp_path, name="toy", knobs=arguments)
  if name == "tgap":
    for knobs, message in (
      (dict(codec="transform", bits=0.0), "bits=0.0 for each of .* not enough"),
      (dict(latent_bits=9), "lloyd_max expected bits"),
      (dict(fit_steps=0), "steps=0"),
      (dict(normalise="column"), "normalise='column'"),
      (dict(rounds=1), "rounds=1"),
    ):
      with pytest.raises(ValueError, match=message):
        config.experiment(**flat.grouped(config.experiment, **toy | knobs))
    # Rounds with an autoencoder are made, not run.
    knobs = FEDERATED | {"codec": str(tmp_path / "codec"), "refit_every": 1}
    make = configs.load("cg_fedllm").experiment
    assert "cg_fedllm" in make(**flat.grouped(make, **knobs))
  records = [
    json.loads(path.read_text()) for path in tmp_path.rglob("run.json")
  ]
  assert records and all("finished" in record for record in records)
  for record in records:  # Flat, by the names of the command line.
    assert record["knobs"]["sequence_length"] == toy["sequence_length"]
    assert record["knobs"].get("rank", 2) == 2
  results = [*tmp_path.rglob("adapter_model.safetensors")]
  assert results or (tmp_path / "model" / "model.safetensors").is_file()


def test_its_docstrings_tell_the_command_and_every_knob(config):
  name = pathlib.Path(config.__file__).stem
  assert f"fedjax-llm run {name}" in config.__doc__ or (
    f"fedjax-llm pretrain {name}" in config.__doc__
  )
  for knob in inspect.signature(config.experiment).parameters.values():
    assert f"  {knob.name}: " in config.experiment.__doc__
    assert knob.kind is knob.KEYWORD_ONLY
    if dataclasses.is_dataclass(knob.default):
      for field in dataclasses.fields(knob.default):
        assert f"  {field.name}: " in type(knob.default).__doc__


# Options of before knobs were grouped.
OPTIONS = {
  "quickstart": "seed rounds clients_per_round clients_per_step rank alpha"
  " dropout targets download_density upload_density client_learning_rate"
  " server_learning_rate local_epochs local_steps batch_size sequence_length"
  " held_out_rows dtype",
  "flasc_newsgroups": "model data clients dirichlet_alpha pooling init_adapter"
  " seed rounds rank quantize dtype clients_per_step",
  "methods": "method data model seed rounds clients_per_round clients_per_step"
  " rank targets density upload_density warm_up_rounds client_learning_rate"
  " server_learning_rate local_steps batch_size sequence_length held_out_rows"
  " epsilon delta clip_norm links dropout_before dropout_during"
  " deadline_seconds over_selection",
  "tgap": "pretraining source representation share codec bits latent_bits"
  " normalise fit_steps fit_batch_size fit_learning_rate rounds rank",
  "cg_fedllm": "codec bits representation aggregation error_feedback unbiased"
  " refit_every volunteers fit_steps fit_learning_rate rounds rank",
  "pretrain": "seed steps steps_per_round batch_size rows_at_once"
  " sequence_length learning_rate warmup vocabulary hidden_size layers",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_grouped_knobs_are_flat_on_the_command_line(name, capsys):
  options = configs.options_of(configs.load(name))
  with pytest.raises(SystemExit):
    tyro.cli(options, args=["--help"])
  shown = re.findall(r"--([a-z-]+)", capsys.readouterr().out)
  expected = {x.replace("_", "-") for x in OPTIONS[name].split()}
  assert expected - set(shown) == set()


def test_an_option_goes_into_the_group_that_has_it():
  options = configs.options_of(configs.load("quickstart"))
  knobs = tyro.cli(
    options, args=["--rounds", "3", "--rank", "2", "--upload-density", "0.5"]
  )
  assert (knobs.schedule.rounds, knobs.schedule.clients_per_round) == (3, 6)
  assert (knobs.adapter.rank, knobs.adapter.alpha) == (2, 4.0)
  assert knobs.densities.upload_density == 0.5


def test_dolly_is_divided_as_shepherd_does_too(data):
  experiment = configs.load("flasc_dolly").experiment(
    data=str(data / "dolly15k_fed10" / "local_training_*.json"),
    clients="shepherd",
  )
  population = experiment.population
  assert len(population.names) == 10
  assert population.label_names == (
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
  )
