"""Config files: where they are, how they are loaded, what their options are.

A config is a Python file with a function `experiment` of keyword-only knobs.
Its signature gives the options of the command, and its docstring their help.
"""

import ast
import dataclasses
import importlib.machinery
import inspect
import pathlib
import sys
import types
from typing import Annotated, Any, get_type_hints

# The module name of a user's own config.
OWN = "fedjax_llm_config"
# What may differ in a run that is resumed: parameters of `runner.run`.
ALLOWANCES = {
  "allow_other_devices": "go on with a run that was begun on other devices",
  "allow_other_versions": (
    "go on with a run that was begun with other versions of the libraries"
  ),
}


def folder() -> pathlib.Path:
  """Returns the folder of shipped configs, in the wheel or the repository."""
  package = pathlib.Path(__file__).parent.parent
  shipped = package / "configs"
  return shipped if shipped.is_dir() else package.parent / "configs"


def summaries() -> list[str]:
  """Returns a line for each config: its name and its docstring's first line."""
  lines = []
  for path in sorted(folder().glob("*.py")):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first, *_ = text.splitlines() or [""]
    lines.append(f"{path.stem:<20} {first}")
  return lines


def find(name_or_path: str) -> pathlib.Path:
  """Returns the file of a config, by its name under `configs/` or by its path.

  Raises:
    ValueError: if there is no such file.
  """
  path = pathlib.Path(name_or_path)
  if path.suffix != ".py":
    path = folder() / f"{name_or_path}.py"
  if not path.is_file():
    names = sorted(x.stem for x in folder().glob("*.py"))
    raise ValueError(
      f"CONFIG expected the path of a Python file, or one of"
      f" {', '.join(names)}; got {name_or_path!r}, which does not exist."
    )
  return path


def load(name_or_path: str) -> types.ModuleType:
  """Imports a config by its name under `configs/` or by its path.

  Raises:
    ValueError: if there is none, or it has no `experiment` function.
  """
  path = find(name_or_path)
  shipped = not name_or_path.endswith(".py")
  name = f"fedjax_llm.configs.{path.stem}" if shipped else OWN
  module = types.ModuleType(name)
  module.__file__ = str(path)
  sys.modules[name] = module  # Dataclasses in a config look up their module.
  importlib.machinery.SourceFileLoader(name, str(path)).exec_module(module)
  if not callable(getattr(module, "experiment", None)):
    raise ValueError(
      f"{path} has no function `experiment`. Define one: its keyword-only"
      " parameters are the config's knobs."
    )
  return module


def options_of(module: types.ModuleType, *, resumes: bool = False) -> type:
  """Makes a dataclass with the knobs of a config, and `out`.

  If a knob is a dataclass, such as a `Schedule`, each of its fields becomes an
  option.

  Args:
    module: the config.
    resumes: whether to add the options of `ALLOWANCES`.

  Raises:
    ValueError: if a knob has no type.
  """
  import tyro

  hints = get_type_hints(module.experiment, include_extras=True)
  fields: list[Any] = []
  for name, parameter in inspect.signature(
    module.experiment
  ).parameters.items():
    if name not in hints:
      raise ValueError(
        f"{module.__file__}: the knob {name!r} has no type. Annotate it, for"
        f" instance `{name}: float = 1.0`."
      )
    required = parameter.default is inspect.Parameter.empty
    default = dataclasses.MISSING if required else parameter.default
    hint = hints[name]
    if dataclasses.is_dataclass(hint):
      hint = Annotated[hint, tyro.conf.arg(name="")]
    fields.append((name, hint, dataclasses.field(default=default)))
  help_of = lambda text: tyro.conf.arg(help=text)
  for name, text in ALLOWANCES.items() if resumes else ():
    flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, help_of(text)]
    fields.append((name, flag, dataclasses.field(default=False)))
  out = help_of("folder of the run; runs/CONFIG if not given")
  default = dataclasses.field(default=None)
  fields.append(("out", Annotated[pathlib.Path | None, out], default))
  text = inspect.getdoc(module.experiment) or ""
  return dataclasses.make_dataclass(
    "Knobs", fields, namespace={"__doc__": text}, kw_only=True
  )
