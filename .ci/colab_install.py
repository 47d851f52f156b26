"""Shows what pip would add to Colab's images, and fails if it is too much.

  python .ci/colab_install.py dist/fedjax_llm-0.1.0-py3-none-any.whl

An image is known by its packages' versions, in `colab/constraints.*.txt`. Pip
is asked twice what it would install, without installing it. Among packages of
those versions and their real requirements: is there a solution? In a virtual
environment with the names and versions alone, which is what pip looks at on
Colab: does it leave them as they are? All that is added must be pure Python.
PyTorch must not be: it is not in the lists, as Colab builds its own.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
# The extra that would suit the image. For the TPU there is none: `tpu` asks for
# another libtpu than Colab's.
EXTRAS = {"gpu": "[cuda]", "tpu": ""}


def main(wheel: str) -> None:
  """Prints what would be added; exits with a sentence if it does harm."""
  path = str(pathlib.Path(wheel).resolve())
  for kind, extra in EXTRAS.items():
    constraints = ROOT / "colab" / f"constraints.{kind}.txt"
    image = versions(constraints)
    solved = dry_run(
      *("--ignore-installed", "--constraint", str(constraints)),
      *("--python-version", "3.13", "--only-binary", ":all:", "--target", "."),
      path + extra,
    )
    check({x: y for x, y in solved.items() if x not in image}, image)
    added = dry_run(path, image=image)
    check(added, image)
    print(f"{kind}: pip would add", ", ".join(sorted(added)))


def versions(path: pathlib.Path) -> dict[str, str]:
  """The version of each package of an image, by its normalised name."""
  lines = path.read_text().splitlines()
  pairs = (line.split("==") for line in lines if not line.startswith("#"))
  return {normalised(name): version for name, version in pairs}


def normalised(name: str) -> str:
  """A package's name in the form in which pip compares names."""
  return re.sub(r"[-_.]+", "-", name).lower()


def dry_run(*arguments: str, image: dict[str, str] | None = None):
  """The file that pip would install of each package.

  Args:
    *arguments: arguments of `pip install`.
    image: versions of what is installed already.
  """
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "venv", "--without-pip", folder]
    subprocess.run(command, check=True)
    (site,) = pathlib.Path(folder).glob("lib/python*/site-packages")
    for name, version in (image or {}).items():
      info = site / f"{name.replace('-', '_')}-{version}.dist-info"
      info.mkdir()
      text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
      (info / "METADATA").write_text(text)
    command = [sys.executable, "-m", "pip", "--python", f"{folder}/bin/python"]
    command += ["install", "--quiet", "--dry-run", "--report", "-", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE)
  if done.returncode:
    sys.exit("pip cannot install beside this image: lower our bounds.")
  return {
    normalised(item["metadata"]["name"]): pathlib.Path(
      item["download_info"]["url"]
    ).name
    for item in json.loads(done.stdout)["install"]
  }


def check(added: dict[str, str], image: dict[str, str]) -> None:
  """Exits if pip would replace what is there, or add what is compiled."""
  for name, file in added.items():
    if name in image:
      sys.exit(f"pip would replace {name}=={image[name]} by {file}.")
    if name == "torch" or not file.endswith("-none-any.whl"):
      sys.exit(f"Expected wheels of pure Python and no torch, got {file}.")


if __name__ == "__main__":
  main(sys.argv[1])
