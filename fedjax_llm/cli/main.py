"""The command line: `fedjax-llm run CONFIG`, `data CONFIG`, `compare` and more.

A config is a Python file with a function `experiment` of keyword-only knobs;
its signature and docstring are the command's options and their help.
"""

import ast
import dataclasses
import importlib.machinery
import inspect
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import tyro

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
# The module that a config of the user's own becomes.
_CONFIG = "fedjax_llm_config"
# Each device holds a copy of the base model.
_MOST_CPU_DEVICES = 8


def main() -> None:
  """The entry point; exits with 2 on bad input, 130 after Ctrl-C."""
  try:
    _prepare_process()
    _command(sys.argv[1:] or ["--help"])
  except (ValueError, FloatingPointError, ImportError, OSError) as error:
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
    print(f"{_USAGE}\n\nConfigs:\n\n  " + "\n  ".join(_summaries()))
    return
  module = load_config(config)
  name = pathlib.Path(config).stem
  knobs = tyro.cli(
    options_of(module), prog=f"fedjax-llm {command} {config}", args=options
  )
  values = dict(vars(knobs))
  out = values.pop("out") or pathlib.Path("runs") / name
  run(module.experiment, out, name=name, knobs=values)


def config_folder() -> pathlib.Path:
  """Where the shipped configs are: in the wheel, or beside the package."""
  package = pathlib.Path(__file__).parent.parent
  shipped = package / "configs"
  return shipped if shipped.is_dir() else package.parent / "configs"


def load_config(name_or_path: str) -> types.ModuleType:
  """Imports a config by its name under `configs/` or by its path.

  Raises:
    ValueError: if there is none, or it has no `experiment` function.
  """
  path = pathlib.Path(name_or_path)
  shipped = path.suffix != ".py"
  if shipped:
    path = config_folder() / f"{name_or_path}.py"
  if not path.is_file():
    names = sorted(x.stem for x in config_folder().glob("*.py"))
    raise ValueError(
      f"no config {name_or_path!r}: expected the path of a Python file, or one"
      f" of {', '.join(names)}."
    )
  name = f"fedjax_llm.configs.{path.stem}" if shipped else _CONFIG
  module = types.ModuleType(name)
  module.__file__ = str(path)
  sys.modules[name] = module  # Dataclasses of a config look themselves up.
  importlib.machinery.SourceFileLoader(name, str(path)).exec_module(module)
  if not callable(getattr(module, "experiment", None)):
    raise ValueError(
      f"{path} has no function `experiment`; a config's knobs are its"
      " keyword-only parameters."
    )
  return module


def options_of(module: types.ModuleType) -> type:
  """A dataclass of the knobs of a config, and of `out`.

  Raises:
    ValueError: if a knob has no type.
  """
  hints = get_type_hints(module.experiment, include_extras=True)
  fields: list[Any] = []
  for name, parameter in inspect.signature(
    module.experiment
  ).parameters.items():
    if name not in hints:
      raise ValueError(f"{module.__file__}: the knob {name!r} has no type.")
    required = parameter.default is inspect.Parameter.empty
    default = dataclasses.MISSING if required else parameter.default
    fields.append((name, hints[name], dataclasses.field(default=default)))
  out = tyro.conf.arg(help="folder of the run; runs/CONFIG if not given")
  fields.append(
    (
      "out",
      Annotated[pathlib.Path | None, out],
      dataclasses.field(default=None),
    )
  )
  text = inspect.getdoc(module.experiment) or ""
  return dataclasses.make_dataclass(
    "Knobs", fields, namespace={"__doc__": text}, kw_only=True
  )


def _summaries() -> list[str]:
  """A line a config: its name and the first line of its file's docstring."""
  lines = []
  for path in sorted(config_folder().glob("*.py")):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first, *_ = text.splitlines() or [""]
    lines.append(f"{path.stem:<18} {first}")
  return lines


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
    if name == _CONFIG:
      return True
    if name.startswith("fedjax_llm."):
      return False
  return False


def _fail(message: str, status: int = 2) -> None:
  print(f"fedjax-llm: {message}", file=sys.stderr)
  raise SystemExit(status)


if __name__ == "__main__":
  main()
