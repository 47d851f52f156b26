"""`fl`: what an editor sees is what a program gets, however it imports."""

import ast
import importlib
import inspect
import itertools
import pathlib
import subprocess
import sys
import types

import pytest

import fedjax_llm as fl

SOURCE = pathlib.Path(fl.__file__)
FACTORIES = ("flasc", "fed_avg", "scaffold")


def seen_by_editors() -> dict[str, str]:
  """Names in the block that type checkers read, and where they are from."""
  (block,) = (
    node
    for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body
    if isinstance(node, ast.If)
  )
  return {
    alias.asname: f"{node.module}.{alias.name}"
    for node in block.body
    for alias in node.names
  }


@pytest.mark.parametrize("name", seen_by_editors())
def test_a_name_is_what_editors_see(name):
  module, _, attribute = seen_by_editors()[name].rpartition(".")
  home = importlib.import_module(module)
  if not hasattr(home, attribute):
    importlib.import_module(f"{module}.{attribute}")
  assert getattr(fl, name) is getattr(home, attribute)


def test_a_program_gets_no_name_that_editors_do_not_see():
  assert {*fl._MODULES, *fl._HOMES} == set(seen_by_editors())
  assert set(seen_by_editors()) <= set(dir(fl))
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = fl.nothing


@pytest.mark.parametrize(
  "name", ["algorithms", "compression", "aggregators", "tasks", "data"]
)
def test_namespaces_are_modules_that_tell_what_they_are(name):
  module = getattr(fl, name)
  assert isinstance(module, types.ModuleType)
  assert inspect.getdoc(module)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_functions_stay_functions_in_every_order_of_import(order):
  statements = [
    "import fedjax_llm as fl; fl.algorithms.flasc",
    "import fedjax_llm.federated.algorithms.flasc",
    "from fedjax_llm.federated.algorithms import fed_avg, flasc, scaffold",
  ]
  lines = [statements[i] for i in order]
  lines += ["import inspect", "import fedjax_llm as fl"]
  lines += [f"assert inspect.isfunction(fl.algorithms.{x})" for x in FACTORIES]
  lines += [f"assert inspect.ismodule({x})" for x in FACTORIES]
  subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_modules_of_messages_are_beside_the_compressors():
  importlib.import_module("fedjax_llm.compression.sparse")
  assert inspect.isfunction(fl.compression.top_k)
  assert inspect.ismodule(fl.compression.sparse)
  assert inspect.ismodule(fl.compression.wire)
