"""What the commands do, once their arguments are parsed."""

import inspect
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro

from fedjax_llm import data_report, finetuning, report
from fedjax_llm import experiment as experiments
from fedjax_llm.data import batches
from fedjax_llm.evaluation import likelihood
from fedjax_llm.models import adapters, families, language, lora, pretrained


def run(
  make: Callable[..., Any],
  out: pathlib.Path,
  *,
  name: str,
  knobs: Mapping[str, Any],
) -> None:
  """Runs or resumes what a config makes, and reports.

  Args:
    make: the config's `experiment` function; returns an `Experiment`, or
      several by name, each of which gets a subfolder.
    out: folder of the run.
    name: of the config.
    knobs: arguments of `make`; the others have their defaults.

  Raises:
    KeyboardInterrupt: after Ctrl-C, telling how to go on.
  """
  arguments = inspect.signature(make).bind(**knobs)
  arguments.apply_defaults()
  knobs = arguments.arguments
  made = make(**knobs)
  several = isinstance(made, Mapping)
  for label, experiment in (made if several else {name: made}).items():
    folder = out / label if several else out
    try:
      experiments.run(experiment, folder, name=label, knobs=knobs)
    except experiments.Interrupted as stop:
      raise KeyboardInterrupt(
        f"{label} {stop}; its state is saved. The same command goes on from"
        " there."
      ) from None
  runs = report.load(out)
  report.plot(runs, out / "loss.png")
  print(f"\n{report.table(runs)}\n\nPlot: {out / 'loss.png'}")


def data(
  make: Callable[..., Any],
  out: pathlib.Path,
  *,
  name: str,
  knobs: Mapping[str, Any],
) -> None:
  """Tells and draws which client has what, and trains nothing.

  Args:
    make: as for `run`; of several experiments, the first one's clients.
    out: folder of the picture; made if absent.
    name: of the config.
    knobs: arguments of `make`; the others have their defaults.

  Raises:
    ValueError: if the experiment has no clients.
  """
  made = make(**knobs)
  first = next(iter(made.values())) if isinstance(made, Mapping) else made
  if first.population is None:
    raise ValueError(
      f"data expected a config with clients, got {name}, which has none."
    )
  out.mkdir(parents=True, exist_ok=True)
  data_report.plot(first.population, out / "data.png", name=name)
  shown = data_report.table(first.population, name=name)
  print(f"{shown}\n\nPlot: {out / 'data.png'}")


def compare(
  runs: tyro.conf.Positional[tuple[pathlib.Path, ...]],
  /,
  *,
  out: pathlib.Path = pathlib.Path("compare.png"),
) -> None:
  """Compare finished runs: a table and a plot of utility against bytes.

  Args:
    runs: run folders, or folders of run folders.
    out: where to draw the plot.
  """
  if not runs:
    raise ValueError("compare expected one or more run folders, got none.")
  loaded = [run for folder in runs for run in report.load(folder)]
  report.plot(loaded, out)
  print(f"{report.table(loaded)}\n\nPlot: {out}")


def evaluate(
  *,
  model: str,
  text: pathlib.Path,
  adapter: pathlib.Path | None = None,
  task: Literal["perplexity"] = "perplexity",
  dtype: finetuning.Dtype = "float32",
  as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
  """Evaluate a model, with or without an adapter, on a text.

  The text is tokenised once, with the tokenizer's special tokens, and scored
  in one pass where it fits the model's context, else in windows of it. The
  loss is the mean over all predicted tokens.

  Args:
    model: Hugging Face folder or hub name of the base model.
    text: a UTF-8 file.
    adapter: PEFT folder of a LoRA adapter for it.
    task: what to measure.
    dtype: what to compute in.
    as_json: print one line of JSON.
  """
  if not text.is_file():
    raise ValueError(f"--text expected a file, got {text}, which is none.")
  folder = pretrained.resolve(model)
  config, params = pretrained.load(folder, dtype=jnp.dtype(dtype))
  settings, factors = (
    adapters.load(adapter, config) if adapter else (None, None)
  )
  tokenizer = finetuning.load_tokenizer(folder, config)
  rows = batches.rows_of_text(
    [text.read_text(encoding="utf-8")],
    tokenizer,
    config.max_position_embeddings,
  )
  # A short text must not cost what the longest one would.
  width = int(rows.mask.any(0).sum())
  rows = batches.Examples(rows.tokens[:, : width + 1], rows.mask[:, :width])
  network = families.model(config, settings, dtype=jnp.dtype(dtype))
  if factors is not None:
    lora.check(network, factors)
  score = likelihood.evaluator(language.score_fn(network), rows, batch_size=1)
  result = score(factors, params) | {"tokens": int(rows.mask.sum())}
  print(
    json.dumps({"task": task, **result})
    if as_json
    else "\n".join(f"{name:<11}{value:.6g}" for name, value in result.items())
  )
