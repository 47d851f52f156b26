"""Maps the parameters of a model to the tensors of a Hugging Face checkpoint.

Modules have the same names as in transformers, except that the layers are
stacked under the name "layers". For example, the parameter
`layers/self_attn/q_proj/kernel` [layers, in, out] holds the tensors
`model.layers.{i}.self_attn.q_proj.weight` [out, in].
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

Path = tuple[str, ...]
_WEIGHTS = {"kernel", "scale", "embedding"}


def unstack(path: Path, leaf: Any) -> Iterable[tuple[int | None, Any]]:
  """Returns pairs of a layer's number and its part of the parameter `leaf`.

  A parameter outside the stack has one part, with the number None.
  """
  return enumerate(leaf) if path[0] == "layers" else [(None, leaf)]


class Layout(NamedTuple):
  """The names of the modules of one family of models.

  Attributes:
    base: the prefix of all modules except the heads.
    layers: the name of the stack of layers, below `base`.
    heads: the modules outside `base`. If only the checkpoint has one of them,
      it is ignored.
    optional: modules in `base`, ignored if only the checkpoint has them.
    transposed: whether dense kernels are stored [out, in]. Heads always are.
    renamed: pairs (pattern, replacement) that make older names current.
    ignored: patterns that match the names of tensors to ignore.
    stored: pairs (pattern, replacement) that make current names those of files.
  """

  base: str
  layers: str
  heads: tuple[str, ...]
  optional: tuple[str, ...] = ()
  transposed: bool = True
  renamed: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()
  stored: tuple[tuple[str, str], ...] = ()

  def module_name(self, path: Path, layer: int | None) -> str:
    """Returns the name in transformers, e.g. `model.layers.3.mlp.up_proj`."""
    if path[0] == "layers":
      return ".".join((self.base, self.layers, str(layer), *path[1:]))
    return ".".join(path if path[0] in self.heads else (self.base, *path))

  def tensor_name(self, path: Path, layer: int | None) -> str:
    """Returns the name of a parameter in a checkpoint."""
    leaf = "weight" if path[-1] in _WEIGHTS else path[-1]
    if len(path) == 1:
      return f"{self.base}.{leaf}"
    return f"{self.module_name(path[:-1], layer)}.{leaf}"

  def place(self, name: str) -> tuple[Path, int | None]:
    """Returns the path and the layer of a module, given its transformers name.

    The layer is None for a module outside the stack.
    """
    if name.split(".")[0] in self.heads:
      return tuple(name.split(".")), None
    name = name.removeprefix(f"{self.base}.")
    stack = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", name)
    if stack is None:
      return tuple(name.split(".")), None
    return ("layers", *stack[2].split(".")), int(stack[1])

  def current(self, name: str) -> str:
    """Returns the current name of a tensor or module in any checkpoint."""
    for pattern, replacement in self.renamed:
      name = re.sub(pattern, replacement, name)
    if name.startswith(f"{self.base}.") or name.split(".")[0] in self.heads:
      return name
    return f"{self.base}.{name}"  # A base model saved alone has no prefix.

  def stored_name(self, name: str) -> str:
    """Returns the name of a tensor in the files that transformers writes."""
    for pattern, replacement in self.stored:
      name = re.sub(pattern, replacement, name)
    return name

  def is_transposed(self, path: Path) -> bool:
    """Returns whether a parameter is stored with its last two axes swapped."""
    return path[-1] == "kernel" and (self.transposed or path[0] in self.heads)

  def is_optional(self, name: str) -> bool:
    """Returns whether a tensor is ignored if only the checkpoint has it."""
    inner = name.removeprefix(f"{self.base}.")
    return (
      name.split(".")[0] in self.heads
      or inner.split(".")[0] in self.optional
      or any(re.search(pattern, name) for pattern in self.ignored)
    )
