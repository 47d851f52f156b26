"""Knobs of a config by the names of the command line."""

import dataclasses
import inspect


def grouped(make, **knobs):
  """Arguments of a config: each knob in the group that has it."""
  arguments = {}
  for name, parameter in inspect.signature(make).parameters.items():
    if dataclasses.is_dataclass(parameter.default):
      fields = [x.name for x in dataclasses.fields(parameter.default)]
      own = {x: knobs.pop(x) for x in fields if x in knobs}
      arguments[name] = dataclasses.replace(parameter.default, **own)
    elif name in knobs:
      arguments[name] = knobs.pop(name)
  assert not knobs, f"the config has no knobs {sorted(knobs)}"
  return arguments
