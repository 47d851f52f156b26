"""Tiers: which client has which capability."""

from collections.abc import Callable
from typing import Any


def in_turn(
  count: int, of_client: Callable[[Any], Any] | None = None
) -> Callable[[Any], Any]:
  """Returns the function from numbers of clients to numbers of tiers.

  Args:
    count: the number of tiers.
    of_client: the function itself, if the user has one; None deals the tiers
      out in turn, as the authors of FLASC do.
  """
  return of_client or (lambda client: client % count)
