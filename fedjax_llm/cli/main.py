"""The command line: `fedjax-llm COMMAND ...`, see `USAGE`.

A command imports only what it needs, so that help is fast.
"""

import os
import pathlib
import sys
import traceback
from typing import Any

from fedjax_llm.cli import configs

USAGE = """usage: fedjax-llm COMMAND ...

  run CONFIG [--knobs] [--out DIR]     run an experiment, or resume it
  data CONFIG [--knobs] [--out DIR]    show which client has which data
  export CONFIG [--knobs] [--out DIR]  write the adapter of a run so far
  compare DIR DIR ...                  compare the utility and bytes of runs
  evaluate RUN --task TASK ...         ceval, mmlu, perplexity, classification
  merge --adapter FOLDER --out DIR     merge an adapter into its base model
  chat --adapter FOLDER ...            see what an adapter changes
  pretrain [CONFIG] [--knobs]          train a base model

CONFIG is a name or the path of a Python file with an `experiment` function.
`fedjax-llm run` lists the names, `fedjax-llm COMMAND --help` tells more."""
_ON_CONFIGS = ("run", "data", "export", "pretrain")
_COMMANDS = (*_ON_CONFIGS, "compare", "evaluate", "merge", "chat")
# Commands that run long enough for huge pages to be worth a restart.
_LONG = ("run", "pretrain", "evaluate")
_HELP = ("-h", "--help")
# A limit, because each device holds a copy of the base model.
_MOST_CPU_DEVICES = 8


def main() -> None:
  """The entry point; exits with 2 on bad input, 130 after Ctrl-C."""
  try:
    _command(sys.argv[1:] or ["--help"])
  except (ValueError, FloatingPointError, ImportError, OSError) as error:
    if _is_of_a_config(error):
      raise
    _fail(str(error))
  except KeyboardInterrupt as stop:
    _fail(str(stop) or "stopped.", status=130)


def _command(arguments: list[str]) -> None:
  command, *arguments = arguments
  if command in _HELP:
    print(USAGE)
    return
  if command not in _COMMANDS:
    raise ValueError(
      f"COMMAND expected one of {', '.join(_COMMANDS)}; got {command!r}."
      " See `fedjax-llm --help`."
    )
  if command == "pretrain" and (not arguments or arguments[0].startswith("-")):
    arguments = ["pretrain", *arguments]
  if command in _ON_CONFIGS:
    if not arguments or arguments[0] in _HELP:
      print(f"{USAGE}\n\nConfigs:\n\n  " + "\n  ".join(configs.summaries()))
      return
    configs.find(arguments[0])
  _prepare_process(
    restart=command in _LONG and not set(_HELP).intersection(arguments)
  )
  if command in _ON_CONFIGS:
    _on_config(command, *arguments)
  else:
    _tyro(_function(command), command, arguments)


def _on_config(command: str, config: str, *options: str) -> None:
  """Runs the experiments of a config, shows their data, or exports them."""
  from fedjax_llm.cli import run

  trains = command in ("run", "pretrain")
  module = configs.load(config)
  knobs = _tyro(
    configs.options_of(module, resumes=trains), f"{command} {config}", options
  )
  values = dict(vars(knobs))
  name = pathlib.Path(config).stem
  out = values.pop("out") or pathlib.Path("runs") / name
  if trains:
    allowed = {key: values.pop(key) for key in configs.ALLOWANCES}
    run.run(module.experiment, out, name=name, knobs=values, **allowed)
    return
  function = {"data": run.data, "export": run.export}[command]
  function(module.experiment, out, name=name, knobs=values)


def _function(command: str) -> Any:
  """Returns the function of a command; its signature gives the options."""
  if command == "compare":
    from fedjax_llm.cli import compare

    return compare.compare
  if command == "evaluate":
    from fedjax_llm.cli import evaluate

    return evaluate.evaluate
  from fedjax_llm.cli import models

  return {"merge": models.merge, "chat": models.chat}[command]


def _tyro(function: Any, command: str, options: Any) -> Any:
  import tyro

  return tyro.cli(function, prog=f"fedjax-llm {command}", args=options)


def _prepare_process(*, restart: bool) -> None:
  """Makes settings that must precede JAX's start.

  XLA's CPU backend allocates new temporary buffers in every step. Huge pages
  save the time of page faults there. glibc reads the setting when a process
  starts, so the process restarts itself once, before any slow import.
  """
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  # On a CPU every core is a device that trains its own clients.
  cores = min(os.cpu_count() or 1, _MOST_CPU_DEVICES)
  os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(cores))
  if restart and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_of_a_config(error: Exception) -> bool:
  """Returns whether an error is from a user's config, not from this package.

  Other libraries in the traceback do not count.
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
