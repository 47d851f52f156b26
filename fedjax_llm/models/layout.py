"""Where a parameter of ours is in a checkpoint of Hugging Face's.

The modules of a model here have the names that transformers gives them, but
that its layers are stacked under the name "layers". So a parameter
`layers/self_attn/q_proj/kernel` [layers, in, out] is the tensors
`model.layers.{i}.self_attn.q_proj.weight` [out, in].
"""

import re
from typing import NamedTuple

Path = tuple[str, ...]
_WEIGHTS = {"kernel", "scale", "embedding"}


class Layout(NamedTuple):
  """Names of the modules of one family of models.

  Attributes:
    base: prefix of all but the heads.
    layers: what the stack of layers is called below it.
    heads: modules beside the base, that not every checkpoint has.
    optional: modules of the base that not every checkpoint or use has.
    transposed: whether dense kernels are stored [out, in]; heads always are.
    renamed: patterns of older names with what replaces them.
    ignored: patterns of tensors that are computed here, or not needed.
    stored: patterns of present names with what files have in their place.
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
    """A module's name in transformers, e.g. `model.layers.3.mlp.up_proj`."""
    if path[0] == "layers":
      return ".".join((self.base, self.layers, str(layer), *path[1:]))
    return ".".join(path if path[0] in self.heads else (self.base, *path))

  def tensor_name(self, path: Path, layer: int | None) -> str:
    """A parameter's name in a checkpoint."""
    leaf = "weight" if path[-1] in _WEIGHTS else path[-1]
    if len(path) == 1:
      return f"{self.base}.{leaf}"
    return f"{self.module_name(path[:-1], layer)}.{leaf}"

  def place(self, name: str) -> tuple[Path, int | None]:
    """The path of a module named as in transformers, and its layer."""
    if name.split(".")[0] in self.heads:
      return tuple(name.split(".")), None
    name = name.removeprefix(f"{self.base}.")
    stack = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", name)
    if stack is None:
      return tuple(name.split(".")), None
    return ("layers", *stack[2].split(".")), int(stack[1])

  def current(self, name: str) -> str:
    """The present name of a tensor or module of an older checkpoint."""
    for pattern, replacement in self.renamed:
      name = re.sub(pattern, replacement, name)
    if name.startswith(f"{self.base}.") or name.split(".")[0] in self.heads:
      return name
    return f"{self.base}.{name}"  # Saved without its heads.

  def stored_name(self, name: str) -> str:
    """What a tensor is called in the files that transformers writes."""
    for pattern, replacement in self.stored:
      name = re.sub(pattern, replacement, name)
    return name

  def is_transposed(self, path: Path) -> bool:
    """Whether a parameter is stored with its last two axes swapped."""
    return path[-1] == "kernel" and (self.transposed or path[0] in self.heads)

  def is_optional(self, name: str) -> bool:
    """Whether a tensor may be there without use, or be missing."""
    inner = name.removeprefix(f"{self.base}.")
    return (
      name.split(".")[0] in self.heads
      or inner.split(".")[0] in self.optional
      or any(re.search(pattern, name) for pattern in self.ignored)
    )
