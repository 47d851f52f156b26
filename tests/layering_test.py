"""Who may import whom, and who has tests where: read off the source."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "fedjax_llm"
FILES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
# What each folder may import of the others.
ALLOWED = {
  "compression": set(),
  "models": set(),
  "federated": {"compression", "models.lora"},
  "data": {"models", "federated", "compression"},
  "evaluation": {"models", "federated", "compression", "data"},
  # A fit that was stopped goes on.
  "codecs": {
    "compression",
    "federated.draws",
    "federated.parameters",
    "experiments.checkpoints",
  },
}
# What the parts that a reader starts with do without.
PURE = ("models", "compression", "federated", "codecs")
HEAVY = {"datasets", "tyro", "tqdm", "matplotlib"}


def imports(path):
  """Dotted names of all that a file imports, wherever in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} has a relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def within(name, allowed):
  return any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)


def test_there_is_something_to_check():
  assert set(ALLOWED) <= {name.split("/")[0] for name in FILES}


@pytest.mark.parametrize(
  "name", [name for name in FILES if name.split("/")[0] in ALLOWED]
)
def test_folders_import_only_what_is_below_them(name):
  folder = name.split("/")[0]
  inner = {
    imported.removeprefix("fedjax_llm.")
    for imported in imports(FILES[name])
    if imported.split(".")[0] == "fedjax_llm"
  }
  allowed = ALLOWED[folder] | {folder}
  assert not {x for x in inner if not within(x, allowed)}


@pytest.mark.parametrize("name", FILES)
def test_the_library_does_without_torch_and_the_core_without_more(name):
  forbidden = {"torch", "peft"}
  if name.split("/")[0] in PURE:
    forbidden |= HEAVY
  assert not {x for x in imports(FILES[name]) if x.split(".")[0] in forbidden}


@pytest.mark.parametrize("name", FILES)
def test_files_stay_readable_in_one_go(name):
  assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 320


@pytest.mark.parametrize(
  "name", [name for name in FILES if not name.endswith("__init__.py")]
)
def test_modules_have_their_tests_where_one_looks_for_them(name):
  tests = PACKAGE.parent / "tests" / name
  assert tests.with_name(f"{tests.stem}_test.py").is_file()
