"""A warning for runs whose codec transmits nothing about the clients."""

from collections.abc import Callable
from typing import Any

from fedjax_llm.codecs import distortion

# Number of rounds in the mean.
_WINDOW = 3


class Gate:
  """Warns once if decoded updates do not distinguish the clients.

  It warns if the mean innovation cosine of three rounds in a row is below
  `distortion.LEAST_INNOVATION`.
  """

  def __init__(self, write: Callable[[str], None]):
    """Makes a gate.

    Args:
      write: called with the warning, one line.
    """
    self._write = write
    self._cosines: list[float] = []
    self._has_spoken = False

  def see(self, innovation_cosine: Any) -> None:
    """Takes the innovation cosine of a round; None if the round has none."""
    if innovation_cosine is None or self._has_spoken:
      return
    self._cosines = [*self._cosines, float(innovation_cosine)][-_WINDOW:]
    mean = sum(self._cosines) / _WINDOW
    if len(self._cosines) == _WINDOW and mean < distortion.LEAST_INNOVATION:
      self._has_spoken = True
      self._write(
        f"warning: the innovation cosine of the last {_WINDOW} rounds is"
        f" {mean:.3f}, below {distortion.LEAST_INNOVATION}: nothing that"
        " distinguishes the clients arrives. If updates are not zero, send more"
        " of them: a larger density or more bits. With a learned codec: record"
        " the delta, not the state, and more updates; fit the input scale; use"
        " a linear head, not tanh; or use a transform code."
      )
