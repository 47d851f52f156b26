"""The command line: `fedjax-llm run CONFIG`, `compare`, `evaluate`, `pretrain`.

A config is a Python file with a function `experiment` of keyword-only knobs;
its signature and docstring are the command's options and their help.
"""

import dataclasses
import importlib.machinery
import inspect
import os
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any, get_type_hints

import tyro

_COMMANDS = ("run", "pretrain", "compare", "evaluate")
_USAGE = """usage: fedjax-llm COMMAND ...

  run CONFIG [--knobs] [--out DIR]   run or resume an experiment
  compare DIR DIR ...                utility against bytes of finished runs
  evaluate --model FOLDER ...        held-out loss of a model or an adapter
  pretrain CONFIG [--knobs]          train a base model

CONFIG is a name or the path of a Python file with an `experiment` function.
`fedjax-llm COMMAND --help` tells more."""


def main() -> None:
  """The entry point; exits with 2 on bad input, 130 after Ctrl-C."""
  command, *arguments = sys.argv[1:] or ["--help"]
  if command in ("-h", "--help"):
    print(_USAGE)
    return
  if command not in _COMMANDS:
    _fail(f"unknown command {command!r}.\n\n{_USAGE}")
  _prepare_process()
  from fedjax_llm import commands

  functions: dict[str, Callable[..., Any]] = {
    "compare": commands.compare,
    "evaluate": commands.evaluate,
  }
  try:
    if command in functions:
      tyro.cli(functions[command], prog=f"fedjax-llm {command}", args=arguments)
    else:
      _run(command, arguments, commands.run)
  except (ValueError, FloatingPointError, OSError) as error:
    _fail(str(error))
  except KeyboardInterrupt as stop:
    _fail(str(stop) or "stopped.", status=130)


def _run(command: str, arguments: list[str], run: Callable[..., None]) -> None:
  """Runs a config: `arguments` are its name or path, and its knobs."""
  config, *options = arguments or ["--help"]
  if config in ("-h", "--help"):
    print(_USAGE, "\n\nConfigs:\n ", "\n  ".join(_summaries()))
    return
  module = load_config(config)
  knobs = tyro.cli(
    options_of(module),
    prog=f"fedjax-llm {command} {config}",
    args=options,
  )
  values = dataclasses.asdict(knobs)
  out = values.pop("out") or pathlib.Path("runs") / module.__name__
  run(module.experiment, out, name=module.__name__, knobs=values)


def config_folder() -> pathlib.Path:
  """Where the shipped configs are: in the wheel, or beside the package."""
  package = pathlib.Path(__file__).parent
  shipped = package / "configs"
  return shipped if shipped.is_dir() else package.parent / "configs"


def load_config(name_or_path: str) -> types.ModuleType:
  """Imports a config by its name under `configs/` or by its path.

  Raises:
    ValueError: if there is none, or it has no `experiment` function.
  """
  path = pathlib.Path(name_or_path)
  if path.suffix != ".py":
    path = config_folder() / f"{name_or_path}.py"
  if not path.is_file():
    names = sorted(x.stem for x in config_folder().glob("*.py"))
    raise ValueError(
      f"no config {name_or_path!r}: expected the path of a Python file, or one"
      f" of {', '.join(names)}."
    )
  loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
  module = types.ModuleType(path.stem)
  module.__file__ = str(path)
  loader.exec_module(module)
  if not callable(getattr(module, "experiment", None)):
    raise ValueError(
      f"{path} has no function `experiment`; a config's knobs are its"
      " keyword-only parameters."
    )
  return module


def options_of(module: types.ModuleType) -> type:
  """A dataclass of the knobs of a config, and of `out`."""
  hints = get_type_hints(module.experiment)
  fields: list[Any] = [
    (name, hints[name], dataclasses.field(default=parameter.default))
    for name, parameter in inspect.signature(
      module.experiment
    ).parameters.items()
  ]
  fields.append(("out", pathlib.Path | None, dataclasses.field(default=None)))
  out = "out: folder of the run; runs/CONFIG if not given."
  text = inspect.cleandoc(module.experiment.__doc__) + f"\n  {out}"
  return dataclasses.make_dataclass(
    "Knobs", fields, namespace={"__doc__": text}, kw_only=True
  )


def _summaries() -> list[str]:
  """A line a config: its name and the first line of its docstring."""
  lines = []
  for path in sorted(config_folder().glob("*.py")):
    text = load_config(str(path)).experiment.__doc__ or ""
    lines.append(f"{path.stem:<18} {text.strip().splitlines()[0]}")
  return lines


def _prepare_process() -> None:
  """Settings that must precede the first import of JAX.

  Huge pages: XLA's CPU backend allocates its temporary buffers anew in every
  step, and the page faults cost a quarter of the time. glibc reads the setting
  when a process starts, so the process starts itself again, once.
  """
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  # On a CPU every core is a device with clients of its own.
  os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(os.cpu_count() or 1))
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, "-m", __name__, *sys.argv[1:]])


def _fail(message: str, status: int = 2) -> None:
  print(f"fedjax-llm: {message}", file=sys.stderr)
  raise SystemExit(status)


if __name__ == "__main__":
  main()
