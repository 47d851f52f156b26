"""`fl.algorithms` lacks no method."""

import ast
import inspect
import pathlib

from fedjax_llm.federated import algorithms, catalogue

FOLDER = pathlib.Path(algorithms.__file__).parent


def test_every_method_is_in_the_catalogue():
  # What builds a `FederatedAlgorithm` says so in its signature.
  methods = {
    node.name
    for path in FOLDER.glob("*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
    and not node.name.startswith("_")
    and node.returns is not None
    and "FederatedAlgorithm" in ast.unparse(node.returns)
  }
  assert len(methods) > 20
  missing = {name for name in methods if not hasattr(catalogue, name)}
  assert missing == set()


def test_the_catalogue_holds_functions_with_a_docstring():
  names = [name for name in vars(catalogue) if not name.startswith("_")]
  for name in names:
    function = getattr(catalogue, name)
    assert inspect.isfunction(function), name
    assert inspect.getdoc(function), name
