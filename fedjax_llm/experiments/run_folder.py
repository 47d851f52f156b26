"""The files of a run: its record and its log.

  run.json        name, knobs, data, program, versions, device, dates
  metrics.jsonl   one line a round

`run.json` is replaced atomically. `metrics.jsonl` grows by lines; if a killed
process leaves half a line, it is dropped.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import sys
from collections.abc import Mapping
from typing import Any

import jax
import tqdm

from fedjax_llm.experiments import identity

_PACKAGES = ("fedjax-llm", "jax", "jaxlib", "flax", "optax", "numpy")
_PACKAGES += ("orbax-checkpoint",)


def record(
  *,
  name: str,
  knobs: Mapping[str, Any] | None,
  data: Mapping[str, str],
  program: Mapping[str, Any],
  rounds: int,
) -> dict[str, Any]:
  """Returns the content of `run.json` at the start of a run.

  Args:
    name: the name of the experiment.
    knobs: the arguments that made the experiment. A dataclass is replaced by
      its fields. A value that JSON lacks, such as a path, is recorded as text.
    data: names and fingerprints of the data.
    program: fingerprints and settings of the computation.
    rounds: the number of rounds.
  """
  return {
    "experiment": name,
    "knobs": _as_json(flat(knobs or {})),
    "data": dict(data),
    "program": _as_json(program),
    "rounds": rounds,
    **_environment(),
  }


def flat(knobs: Mapping[str, Any]) -> dict[str, Any]:
  """Returns knobs with each dataclass replaced by its fields."""
  values = {}
  for name, value in knobs.items():
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
      values |= flat(vars(value))
    else:
      values[name] = value
  return values


def claim(
  folder: pathlib.Path, now: dict[str, Any], **allowances: bool
) -> None:
  """Writes `run.json`; if there is one, checks that it is of the same run.

  Args:
    folder: the folder of the run; made if absent.
    now: the record of the run.
    **allowances: what may differ, as in `identity.check`.

  Raises:
    ValueError: if the folder holds another run. The message says what differs.
  """
  path = folder / "run.json"
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(path, now)
    return
  allowed = check(folder, now, **allowances)
  before = json.loads(path.read_text())
  after = dict(before)
  if now["rounds"] > before["rounds"]:
    after |= {"rounds": now["rounds"], "knobs": now["knobs"]}
    after.pop("finished", None)
    after.pop("peak_memory_bytes", None)
  if allowed:
    environment = ("versions", "device")
    after["earlier"] = [
      *before.get("earlier", []),
      {name: before[name] for name in environment},
    ]
    after |= {name: now[name] for name in (*environment, "program")}
  if after != before:
    _write_json(path, after)


def check(
  folder: pathlib.Path, now: dict[str, Any], **allowances: bool
) -> list[str]:
  """Checks that the run in `folder` is this one; prints allowed differences.

  Arguments, result and errors are those of `claim` and `identity.check`.
  """
  before = json.loads((folder / "run.json").read_text())
  allowed = identity.check(folder, before, now, **allowances)
  for sentence in allowed:
    tqdm.tqdm.write(f"{folder}: {sentence}.")
  return allowed


def finish(folder: pathlib.Path) -> None:
  """Records that the run is finished, unless that was recorded before."""
  path = folder / "run.json"
  finished = {"finished": _now(), "peak_memory_bytes": peak_memory()}
  _write_json(path, finished | json.loads(path.read_text()))


class Log:
  """`metrics.jsonl`: one line a round, written before the checkpoint."""

  def __init__(self, path: pathlib.Path, *, rounds: int):
    """Opens the log and keeps the lines up to round `rounds`.

    A killed process may have written later lines, or half a line. Those rounds
    are computed again.
    """
    kept = read_metrics(path, rounds) if rounds else []
    _write(path, "".join(json.dumps(line) + "\n" for line in kept))
    self.lines = kept
    self._path = path

  def append(self, line: dict[str, Any]) -> None:
    """Writes a line."""
    self.lines.append(line)
    with self._path.open("a") as file:
      file.write(json.dumps(line) + "\n")


def read_metrics(
  path: pathlib.Path, rounds: int | None = None
) -> list[dict[str, Any]]:
  """Returns the lines of a `metrics.jsonl`, up to round `rounds`."""
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  parsed = [json.loads(line) for line in lines if line.endswith("\n")]
  return [x for x in parsed if rounds is None or x["round"] <= rounds]


def peak_memory() -> int | None:
  """Returns the peak memory of this process in bytes; None on Windows."""
  if sys.platform == "win32":
    return None
  import resource

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else 1024 * peak


def _environment() -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    },
    "device": f"{jax.device_count()} x {device.device_kind}",
    "platform": f"{platform.system()} {platform.machine()}",
    "started": _now(),
  }


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")


def _as_json(value: Any) -> Any:
  return json.loads(json.dumps(value, default=str))


def _write_json(path: pathlib.Path, value: Any) -> None:
  _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: pathlib.Path, text: str) -> None:
  temporary = path.with_suffix(".tmp")
  temporary.write_text(text)
  temporary.replace(path)
