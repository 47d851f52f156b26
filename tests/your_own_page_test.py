"""The programs in docs/your_own.md run, each by itself."""

import ast
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_llm as fl

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "your_own.md"
BLOCKS = re.findall(
  r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
)


def run(block, folder, monkeypatch):
  """Runs a block in an empty folder: its names."""
  monkeypatch.chdir(folder)
  # Dataclasses look their module up, so the block's has a name that is there.
  names = {"__name__": __name__}
  exec(compile(block, str(PAGE), "exec"), names)
  return names


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_run(block, tmp_path, monkeypatch):
  run(block, tmp_path, monkeypatch)


def names_of(word, folder, monkeypatch):
  """Runs the one block that has a word: its names."""
  (block,) = (block for block in BLOCKS if word in block)
  return run(block, folder, monkeypatch)


@pytest.mark.parametrize("name", ["smoothed", "custom"])
def test_what_is_trained_is_learnt(name, tmp_path, monkeypatch):
  names_of(f"runs/{name}", tmp_path, monkeypatch)
  path = tmp_path / "runs" / name / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  first, last = lines[0]["loss"], lines[-1]["loss"]
  # The numbers have a variance of 85.25; the mean of their squares is 325.5.
  assert last < (86 if name == "smoothed" else 0.8 * first)


def test_what_is_promised_is_accounted_for(tmp_path, monkeypatch):
  names_of("runs/private", tmp_path, monkeypatch)
  folder = tmp_path / "runs" / "private"
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  promise = fl.ClientLevel(1.0, 1e-3, "poisson", 40, 10)
  assert json.loads(lines[-1])["epsilon"] == promise.epsilon(5)
  assert (folder / "privacy.txt").is_file()


@pytest.fixture
def task():
  """Four clients look for one vector of 32 numbers, 0 and 1 in turn."""
  target = jnp.tile(jnp.array([0.0, 1.0]), 16)

  def loss_fn(trainable, frozen, examples, mask, key):
    losses = ((trainable["x"][None] - examples) ** 2).sum(axis=1)
    return jnp.where(mask, losses, 0).sum(), mask.sum()

  return fl.tasks.custom(
    loss_fn,
    {"x": jnp.full(32, 0.5)},
    {},
    np.tile(target, (8, 1)),
    starts=[0, 2, 4, 6, 8],
    evaluate=lambda trainable, frozen: {
      "loss": float(((trainable["x"] - target) ** 2).sum())
    },
  )


def final_loss(task, algorithm, folder, *, rounds):
  schedule = fl.Schedule(rounds=rounds, clients_per_round=4, batch_size=2)
  fl.run(fl.fine_tuning(task, algorithm, schedule), folder)
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return json.loads(lines[-1])["loss"]


def test_the_votes_move_every_entry_by_the_rate(task, tmp_path, monkeypatch):
  sign_sgd = names_of("majority_vote", tmp_path, monkeypatch)["sign_sgd"]
  algorithm = sign_sgd(task.loss_fn, 0.1, placement=task.placement)
  # All agree: after three rounds each entry is 0.2 from its target.
  loss = final_loss(task, algorithm, tmp_path / "run", rounds=3)
  assert loss == pytest.approx(32 * 0.2**2, rel=1e-4)


def test_the_composition_sends_half_and_learns(task, tmp_path, monkeypatch):
  names = names_of("half_and_quarter", tmp_path, monkeypatch)
  algorithm = names["half_and_quarter"](task.loss_fn, placement=task.placement)
  state = algorithm.init(task.trainable)
  received = algorithm.received(state, jax.random.key(0))
  assert (received["x"] != 0).sum() == 16
  final_loss(task, algorithm, tmp_path / "run", rounds=2)
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  first, last = json.loads(lines[0]), json.loads(lines[-1])
  assert last["server_loss"] < first["server_loss"] == 8


def test_a_channel_of_ones_own_trains(task, tmp_path, monkeypatch):
  channel = names_of("class Signs", tmp_path, monkeypatch)["channel"]
  algorithm = fl.algorithms.fed_avg(
    task.loss_fn,
    optax.sgd(0.25),
    optax.sgd(1.0),
    channel=channel,
    population=4,
    placement=task.placement,
  )
  # Every update is half of the way, plus or minus: nothing is lost.
  loss = final_loss(task, algorithm, tmp_path / "run", rounds=3)
  assert loss == pytest.approx(32 * (0.5 / 8) ** 2, rel=1e-4)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_nothing_private_is_needed(block):
  for node in ast.walk(ast.parse(block)):
    if isinstance(node, ast.Attribute):
      assert not node.attr.startswith("_") or node.attr == "_replace"
    if isinstance(node, ast.ImportFrom):
      assert node.module != "fedjax_llm"
