"""Rotary position embeddings, and their scalings for longer contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# The required and the optional fields of each type of scaling.
_NEEDED: dict[str, tuple[str, ...]] = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
  "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
  "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions (Su et al., 2021): base and scaling of the frequencies.

  Attributes:
    theta: the base of the frequencies.
    kind: the type of scaling: "default", "linear" (Chen et al., 2023), "llama3"
      (Llama 3.1) or "yarn" (Peng et al., 2023).
    scaling: the fields of the scaling, as pairs (Hugging Face's name, value).
  """

  theta: float = 10000.0
  kind: str = "default"
  scaling: tuple[tuple[str, Any], ...] = ()

  @classmethod
  def from_hugging_face(cls, fields: Mapping[str, Any]) -> "Rope":
    """Reads `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

    Args:
      fields: `rope_theta` and the fields of the scaling, in one mapping.

    Raises:
      ValueError: if the type or a field is not supported, or a field is
        missing.
    """
    rope = dict(fields)
    theta = rope.pop("rope_theta", None) or 10000.0
    older_name = rope.pop("type", None) or "default"
    kind = rope.pop("rope_type", None) or older_name
    if kind not in _NEEDED:
      raise ValueError(
        f"expected rope type in {sorted(_NEEDED)}, got {kind!r}."
      )
    needed = _NEEDED[kind]
    if missing := [name for name in needed if rope.get(name) is None]:
      raise ValueError(
        f"expected values of {missing} for rope type {kind!r}, got none."
        " Complete config.json."
      )
    optional = [x for x in _OPTIONAL.get(kind, ()) if rope.get(x) is not None]
    scaling = tuple((name, rope.pop(name)) for name in (*needed, *optional))
    if rope.pop("partial_rotary_factor", None) not in (None, 1):
      raise ValueError(
        "expected partial_rotary_factor 1, got"
        f" {fields['partial_rotary_factor']}. Take a model that rotates the"
        " whole head."
      )
    rope.pop("original_max_position_embeddings", None)  # Unused by other kinds.
    if unknown := sorted(name for name, value in rope.items() if value):
      raise ValueError(
        f"expected no other fields for rope type {kind!r}, got {unknown}, which"
        " would be ignored."
      )
    return cls(float(theta), kind, scaling)

  def to_hugging_face(self) -> dict[str, Any]:
    """Returns the fields of `rope_parameters`."""
    return {
      "rope_theta": self.theta,
      "rope_type": self.kind,
      **dict(self.scaling),
    }

  @property
  def magnitude(self) -> float:
    """The factor of cosines and sines; 1 unless the kind is "yarn"."""
    if self.kind != "yarn":
      return 1.0
    fields = dict(self.scaling)
    if "attention_factor" in fields:
      return fields["attention_factor"]
    return 0.1 * math.log(fields["factor"]) + 1 if fields["factor"] > 1 else 1.0

  def frequencies(self, head_dim: int) -> Float[np.ndarray, " half_head"]:
    """Returns the frequency of each pair of channels, in radians per position.

    "linear" divides all frequencies by `factor`. "llama3" and "yarn" divide
    only the low ones, keep the high ones, and blend in between.
    """
    frequencies = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if self.kind == "default":
      return frequencies
    fields = dict(self.scaling)
    if self.kind == "linear":
      return frequencies / fields["factor"]
    if self.kind == "llama3":
      low, high = fields["low_freq_factor"], fields["high_freq_factor"]
      turns = fields["original_max_position_embeddings"] * frequencies
      turns = turns / (2 * math.pi)
      kept = np.clip((turns - low) / (high - low), 0, 1)
    else:
      kept = self._yarn_kept(head_dim, fields)
    return frequencies * (kept + (1 - kept) / fields["factor"])

  def _yarn_kept(self, head_dim, fields):
    """Returns the weight of each unscaled frequency in YaRN, in [0, 1]."""

    def channel(turns):
      """Returns the channel with `turns` turns in the original context."""
      length = fields["original_max_position_embeddings"]
      return (head_dim * math.log(length / (turns * 2 * math.pi))) / (
        2 * math.log(self.theta)
      )

    low = channel(fields.get("beta_fast") or 32)
    high = channel(fields.get("beta_slow") or 1)
    if fields.get("truncate", True):
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
      high += 0.001
    return 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)

  def angles(
    self, positions: Int[Array, "rows time"], head_dim: int
  ) -> tuple[
    Float[Array, "rows time half_head"], Float[Array, "rows time half_head"]
  ]:
    """Returns the float32 cosine and sine of each angle, times `magnitude`."""
    frequencies = jnp.asarray(self.frequencies(head_dim), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles) * self.magnitude, jnp.sin(angles) * self.magnitude


def rotate(
  x: Float[Array, "batch time heads head_dim"],
  cos: Float[Array, "rows time half_head"],
  sin: Float[Array, "rows time half_head"],
) -> Float[Array, "batch time heads head_dim"]:
  """Rotates channel i with channel i + head_dim / 2 (Hugging Face's order)."""
  cos, sin = (angles[:, :, None].astype(x.dtype) for angles in (cos, sin))
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
