"""Who may import whom, and who has tests where: read off the source."""

import ast
import json
import pathlib
import subprocess
import sys

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
  "codecs": {"compression", "federated.draws", "federated.parameters"},
}
ALLOWED["experiments"] = {*ALLOWED}
ALLOWED["reporting"] = {*ALLOWED}
# What the parts that a reader starts with do without.
PURE = ("models", "compression", "federated", "codecs")
HEAVY = {"datasets", "tyro", "tqdm", "matplotlib"}
# Slow to import: only by functions that need them, or by what draws and parses.
SLOW = {"transformers", "datasets", "orbax", "scipy", "tokenizers", "tyro"}
SLOW |= {"matplotlib", "pandas", "pyarrow", "torch", "jinja2", "dp_accounting"}
# What configs are made of.
LIGHT = (*PURE, "data", "evaluation", "experiments")


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


def loaded_by(code: str) -> set[str]:
  """The libraries that a new process has imported after it ran `code`."""
  told = "import json, sys; print(json.dumps(list(sys.modules)))"
  out = subprocess.run(
    [sys.executable, "-c", f"{code}\n{told}"],
    cwd=PACKAGE.parent,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  names = json.loads(out.splitlines()[-1])
  return {name.split(".")[0] for name in names if not name.startswith("_")}


def test_the_package_by_itself_imports_nothing_that_is_slow():
  loaded = loaded_by("import fedjax_llm")
  assert "fedjax_llm" in loaded
  assert not loaded & {"jax", "flax", "optax", "numpy", *SLOW}


def test_what_configs_are_made_of_is_imported_without_slow_libraries():
  modules = [
    "fedjax_llm." + name.removesuffix(".py").replace("/", ".")
    for name in FILES
    if name.split("/")[0] in LIGHT and not name.endswith("__init__.py")
  ]
  loaded = loaded_by("import " + ", ".join(modules))
  assert "jax" in loaded and not loaded & SLOW


def test_help_comes_without_jax_and_that_of_configs_without_slow_libraries():
  call = (
    "import sys\n"
    "from fedjax_llm.cli import main\n"
    "sys.argv = ['fedjax-llm', {arguments}]\n"
    "try: main.main()\n"
    "except SystemExit: pass"
  )
  for arguments in ("'--help'", "'run', '--help'", "'run', 'nothing'"):
    loaded = loaded_by(call.format(arguments=arguments))
    assert not loaded & {"jax", *SLOW}, arguments
  loaded = loaded_by(
    "from fedjax_llm.cli import configs\n"
    "for path in configs.folder().glob('*.py'): configs.load(path.stem)"
  )
  assert "jax" in loaded and not loaded & SLOW


def within(name, allowed):
  """Whether a module or a name of it is in one of the allowed folders."""
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
