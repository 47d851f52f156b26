"""The command line: `fedjax-llm run CONFIG`, `data CONFIG`, `compare` and more.

A config is a Python file with a function `experiment` of keyword-only knobs;
its signature and docstring are the command's options and their help.
"""

import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import tyro

from fedjax_llm.cli import configs

_COMMANDS = ("run", "data", "export", "pretrain", "compare", "evaluate")
_COMMANDS += ("merge", "chat")
_USAGE = """usage: fedjax-llm COMMAND ...

  run CONFIG [--knobs] [--out DIR]     run or resume an experiment
  data CONFIG [--knobs] [--out DIR]    show which client has what
  export CONFIG [--knobs] [--out DIR]  write a run's adapter so far
  compare DIR DIR ...                  utility against bytes of finished runs
  evaluate RUN --task TASK ...         ceval, mmlu, perplexity, classification
  merge --adapter FOLDER --out DIR     put an adapter into its base model
  chat --adapter FOLDER ...            see what an adapter changes
  pretrain [CONFIG] [--knobs]          train a base model

CONFIG is a name or the path of a Python file with an `experiment` function.
`fedjax-llm COMMAND --help` tells more."""
# Each device holds a copy of the base model.
_MOST_CPU_DEVICES = 8


def main() -> None:
  """The entry point; exits with 2 on bad input, 130 after Ctrl-C."""
  try:
    _prepare_process()
    _command(sys.argv[1:] or ["--help"])
  except (ValueError, FloatingPointError, OSError) as error:
    if _is_of_a_config(error):
      raise
    _fail(str(error))
  except KeyboardInterrupt as stop:
    _fail(str(stop) or "stopped.", status=130)


def _command(arguments: list[str]) -> None:
  command, *arguments = arguments
  if command in ("-h", "--help"):
    print(_USAGE)
    return
  if command not in _COMMANDS:
    raise ValueError(f"unknown command {command!r}.\n\n{_USAGE}")
  # Slow to import.
  from fedjax_llm.cli import evaluate, models, run

  functions: dict[str, Callable[..., Any]] = {
    "compare": run.compare,
    "evaluate": evaluate.evaluate,
    "merge": models.merge,
    "chat": models.chat,
  }
  if command in functions:
    tyro.cli(functions[command], prog=f"fedjax-llm {command}", args=arguments)
    return
  if command == "pretrain" and (not arguments or arguments[0].startswith("-")):
    arguments = ["pretrain", *arguments]
  on_config = {"data": run.data, "export": run.export}
  _run(command, arguments, on_config.get(command, run.run))


def _run(command: str, arguments: list[str], run: Callable[..., None]) -> None:
  """Runs a config or shows its data: `arguments` are its name and knobs."""
  config, *options = arguments or ["--help"]
  if config in ("-h", "--help"):
    print(f"{_USAGE}\n\nConfigs:\n\n  " + "\n  ".join(configs.summaries()))
    return
  module = configs.load(config)
  name = pathlib.Path(config).stem
  knobs = tyro.cli(
    configs.options_of(module, resumes=command in ("run", "pretrain")),
    prog=f"fedjax-llm {command} {config}",
    args=options,
  )
  values = dict(vars(knobs))
  out = values.pop("out") or pathlib.Path("runs") / name
  allowed = {x: values.pop(x) for x in configs.ALLOWANCES if x in values}
  run(module.experiment, out, name=name, knobs=values, **allowed)


def _prepare_process() -> None:
  """Settings that must precede JAX's start.

  Huge pages: XLA's CPU backend allocates its temporary buffers anew in every
  step, and the page faults cost time. glibc reads the setting when a process
  starts, so the process starts itself again, once.
  """
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  # On a CPU every core is a device with clients of its own.
  cores = min(os.cpu_count() or 1, _MOST_CPU_DEVICES)
  os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(cores))
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  import jax  # Read the variable if it was imported only now.

  jax.config.update(
    "jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"])
  )


def _is_of_a_config(error: Exception) -> bool:
  """Whether the code of a user's config failed, rather than what it was given.

  Libraries called by either do not decide.
  """
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  for frame in reversed(frames):
    name = frame.f_globals.get("__name__", "")
    if name == configs.OWN:
      return True
    if name.startswith("fedjax_llm."):
      return False
  return False


def _fail(message: str, status: int = 2) -> None:
  print(f"fedjax-llm: {message}", file=sys.stderr)
  raise SystemExit(status)


if __name__ == "__main__":
  main()
