"""Payloads: classes whose instances can be sent.

A payload is a frozen dataclass that is also a pytree, so that `jit` and `vmap`
accept it. In a message, a tag below 128 stands for its class.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, dataclass_transform

import jax

_TAGS = range(128)
USER_TAGS = range(64, 128)
_LIBRARY = __name__.partition(".")[0]
# Field types that are refused: neither an array nor a whole number.
_UNSENDABLE = (bool, bytes, complex, dict, float, list, set, str, tuple)


class Format(NamedTuple):
  """How a class is sent: its tag, and for each field whether it is static."""

  tag: int
  fields: dict[str, bool]


# The class of each tag, and the format of each class.
CLASSES: dict[int, type] = {}
FORMATS: dict[type, Format] = {}


@dataclass_transform(frozen_default=True, eq_default=False)
def message(*, tag: int) -> Callable[[type], type]:
  """Makes a class a payload: a frozen pytree dataclass that can be sent.

  A field of type `int` is static: it is part of the payload's shape. Every
  other field is an array of one dimension or another payload; declare it `Any`.
  A payload has a `size`, as a field or a property: the number of entries of the
  vector that it decodes to. It may have a method `check`, which `loads` calls
  and which raises a `ValueError` if the fields do not fit each other.

  Args:
    tag: the number that stands for the class in a message. Your classes use 64
      to 127; the library never uses these. Do not reuse a tag for another class
      while old messages exist.

  Returns:
    The class decorator.

  Raises:
    ValueError: if `tag` is out of range or belongs to another class, or if the
      class cannot be sent.
  """

  def register(cls: type) -> type:
    _require_tag(cls, tag)
    if issubclass(cls, tuple):
      raise ValueError(
        f"message makes a dataclass, but {cls.__name__} is a tuple. Write"
        f" `class {cls.__name__}:` without NamedTuple."
      )
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = _fields_of(cls)
    jax.tree_util.register_dataclass(
      cls,
      data_fields=[name for name, static in fields.items() if not static],
      meta_fields=[name for name, static in fields.items() if static],
    )
    CLASSES[tag], FORMATS[cls] = cls, Format(tag, fields)
    return cls

  return register


def _require_tag(cls: type, tag: int) -> None:
  name = lambda x: f"{x.__module__}.{x.__qualname__}"
  is_own = cls.__module__.partition(".")[0] == _LIBRARY
  allowed = _TAGS if is_own else USER_TAGS
  if tag not in allowed:
    raise ValueError(
      f"message expected a tag in [{allowed.start}, {allowed.stop}) for"
      f" {cls.__name__}, got {tag=}. Tags below {USER_TAGS.start} are the"
      " library's."
    )
  # Running a notebook cell again defines the same class again.
  taken = CLASSES.get(tag, cls)
  if name(taken) != name(cls):
    raise ValueError(
      f"{tag=} already stands for {name(taken)}. Choose another tag in"
      f" [{allowed.start}, {allowed.stop}) for {cls.__name__}."
    )


def _fields_of(cls: Any) -> dict[str, bool]:
  """Returns for each field, by name, whether it is static."""
  names = [field.name for field in dataclasses.fields(cls)]
  if not names:
    raise ValueError(
      f"message found no fields in {cls.__name__}. Give every field a type:"
      " `values: Any` for an array, `size: int` for a number."
    )
  if not (hasattr(cls, "size") or "size" in names):
    raise ValueError(
      f"message expected {cls.__name__} to have a `size`, the number of entries"
      " it decodes to. Add a field `size: int` or a property."
    )
  try:
    # Under `from __future__ import annotations` types are strings.
    types = typing.get_type_hints(cls)
  except NameError as error:
    raise ValueError(
      f"message cannot resolve the field types of {cls.__name__}: {error}."
      " Use `int` and `Any`, imported at the top of the module."
    ) from error
  for name in names:
    kind = typing.get_origin(types[name]) or types[name]
    if kind in _UNSENDABLE:
      raise ValueError(
        f"message cannot send {cls.__name__}.{name} of type {kind.__name__}."
        " Use `int` for a number that is part of the shape, and `Any` for an"
        " array or a payload."
      )
  return {name: types[name] is int for name in names}
