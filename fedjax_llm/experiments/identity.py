"""Checks that a run may resume in a folder that already holds a run.

The two runs must have the same name, knobs, data and program. `rounds` may
grow. Models and data are compared by their fingerprints if both runs have them,
and else by their names, so a model may move to another folder. Other devices
and versions change the last bits of a result. They cause an error unless they
are allowed.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]

# Names, and the fingerprints that are compared instead.
_FINGERPRINTED = {
  "name": "fingerprint",
  "base_model": "base_model_fingerprint",
}
# Entries of the program that other versions or devices change.
_COMPILED = {
  "round": "a round computes something else: its code or a number in it, such"
  " as a learning rate, has changed",
  "start": "training starts from another state: its code, or the parameters or"
  " a number in it, has changed",
}


def check(
  folder: pathlib.Path,
  before: Record,
  now: Record,
  *,
  allow_other_devices: bool = False,
  allow_other_versions: bool = False,
) -> list[str]:
  """Raises an error if a run is not the one in the folder.

  Args:
    folder: the folder, for messages.
    before: the record of the run in the folder.
    now: the record of the run that is to resume.
    allow_other_devices: whether the devices may differ.
    allow_other_versions: whether the versions of libraries may differ.

  Returns:
    A sentence for each allowed difference. If there is one, the compiled
    programs cannot be compared, and a last sentence says so.

  Raises:
    ValueError: if a difference is not allowed. The message names it.
  """
  if "program" not in before:
    raise ValueError(
      f"the run in {folder} was begun by an earlier version of fedjax-llm. That"
      " version did not record what a round computes, and drew other random"
      " numbers. So the run cannot go on: start again in another folder"
      " (--out)."
    )
  _refuse(folder, _settings(before, now))
  if now["rounds"] < before["rounds"]:
    raise ValueError(
      f"the run in {folder} has {before['rounds']} rounds, got"
      f" rounds={now['rounds']}. A run may grow but not shrink: give"
      f" {before['rounds']} rounds or more, or another folder (--out)."
    )
  allowed = []
  for part, plural, is_allowed in (
    ("device", "devices", allow_other_devices),
    ("versions", "versions", allow_other_versions),
  ):
    lines = [_line(x) for x in _differences(part, before.get(part), now[part])]
    if lines and not is_allowed:
      raise ValueError(
        f"the run in {folder} was begun with other {plural}, so that the result"
        " would not be the same to the bit:\n  " + "\n  ".join(lines) + "\n"
        f"Use the earlier {plural}, or allow others: allow_other_{plural}=True"
        f" (--allow-other-{plural})."
      )
    allowed += [f"{x}; allowed" for x in lines]
  _refuse(folder, _program(before, now, is_comparable=not allowed))
  if allowed:
    allowed.append("what a round computes cannot be compared, and is trusted")
  return allowed


_Difference = tuple[str, Any, Any]


def _settings(before: Record, now: Record) -> list[str]:
  """Returns a sentence for each difference in name, knobs and data."""
  found = _differences("experiment", before["experiment"], now["experiment"])
  found += [
    (name, old, new)
    for name, old, new in _differences("knobs", before["knobs"], now["knobs"])
    if name != "rounds" and not _are_places(old, new)
  ]
  data = before["data"], now["data"]
  found += [
    (name, old, new)
    for name, old, new in _differences("data", *data)
    if not all(_FINGERPRINTED.get(name) in x for x in data)
  ]
  return [_line(x) for x in found]


def _program(before: Record, now: Record, *, is_comparable: bool) -> list[str]:
  """Returns a sentence for each difference in the program."""
  return [
    _COMPILED.get(name) or _line((name, old, new))
    for name, old, new in _differences(
      "program", before["program"], now["program"]
    )
    if is_comparable or name not in _COMPILED
  ]


def _are_places(old: Any, new: Any) -> bool:
  """Returns whether two knobs are paths or hub names; None is the default."""
  both = (old, new)
  return all(x is None or isinstance(x, str) for x in both) and any(
    x and ("/" in x or os.sep in x or pathlib.Path(x).suffix) for x in both
  )


def _differences(name: str, old: Any, new: Any) -> list[_Difference]:
  if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
    return [(name, old, new)] if old != new else []
  return [
    (key, old.get(key), new.get(key))
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]


def _line(difference: _Difference) -> str:
  name, old, new = difference
  return f"{name}: {old!r} there, {new!r} now"


def _refuse(folder: pathlib.Path, sentences: list[str]) -> None:
  if sentences:
    raise ValueError(
      f"{folder} holds a run with other settings:\n  "
      + "\n  ".join(sentences)
      + "\nGive the same settings to go on with it, or another folder (--out)."
    )
