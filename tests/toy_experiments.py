"""Experiments of no cost."""

import jax.numpy as jnp

from fedjax_llm.experiments import runner


def halving(*, factor: float = 0.5) -> runner.Experiment:
  """An experiment of no cost."""
  return runner.Experiment(
    rounds=2,
    init=lambda: {"x": jnp.float32(1)},
    round=lambda state, number: (
      {"x": factor * state["x"]},
      {"train_loss": state["x"], "download_bytes": 100, "upload_bytes": 10},
    ),
    evaluate=lambda state: {"loss": state["x"]},
    export=lambda state, folder: None,
    data={},
  )


def several(*, factor: float = 0.5) -> dict[str, runner.Experiment]:
  """Two experiments."""
  return {"slow": halving(factor=factor), "fast": halving(factor=factor**2)}
