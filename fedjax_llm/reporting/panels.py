"""Axes that can be read at the width of a page.

They have small panels in place of long legends, plain numbers at ticks, and
names at the ends of lines.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np

# Of a figure, in inches; a page shows it about 900 pixels wide.
WIDTH = 9.0
_COLUMNS = 4
_HEIGHT = 1.75
_MARGIN = 1.1
# A legend has no more entries than this.
LEGEND = 12


def grid(
  names: Sequence[str], x: str, y: str
) -> tuple[matplotlib.figure.Figure, dict[str, Any]]:
  """Makes a figure with a panel for each name; all panels share their axes.

  Args:
    names: the titles of the panels.
    x: the label of all horizontal axes.
    y: the label of all vertical axes.

  Returns:
    The figure, and its axes by name.
  """
  columns = min(_COLUMNS, len(names))
  rows = math.ceil(len(names) / columns)
  height = _MARGIN + max(_HEIGHT * rows, 2.4)
  figure = matplotlib.figure.Figure((WIDTH, height), layout="constrained")
  shape = figure.subplots(
    rows, columns, sharex=True, sharey=True, squeeze=False
  )
  panels = shape.ravel()
  for axes in panels[len(names) :]:
    axes.set_visible(False)
  # The lowest panel of each column has the tick labels.
  for axes in panels[max(len(names) - columns, 0) : len(names)]:
    axes.xaxis.set_tick_params(labelbottom=True)
  figure.supxlabel(x, fontsize="medium")
  figure.supylabel(y, fontsize="medium")
  for axes, name in zip(panels, names, strict=False):
    axes.set_title(name, fontsize=9)
    axes.grid(alpha=0.3)
  return figure, dict(zip(names, panels, strict=False))


def logarithmic(axes: Any, which: str, values: Sequence[float]) -> None:
  """Makes an axis logarithmic, with plain numbers at its ticks.

  Args:
    axes: the matplotlib axes.
    which: "x" or "y".
    values: all values along the axis. If the largest is less than four times
      the smallest, the axis stays linear.
  """
  axis = getattr(axes, f"{which}axis")
  span = max(values) / min(values)
  if span < 4:
    axis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    return
  getattr(axes, f"set_{which}scale")("log")
  subs = (1, 2, 5) if span < 100 else (1,)
  axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
  axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  axis.set_major_formatter("{x:g}")


def name_ends(
  axes: Any, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, Any]
) -> None:
  """Writes each name to the right of the end of its line.

  Names that would overlap are moved apart, up and down, and the axis is
  extended to the right until they fit. Call it last: it measures the axes as
  they are drawn.

  Args:
    axes: the matplotlib axes with the lines.
    ends: the last point of each line, by name.
    colours: the colour of each name.
  """
  figure = axes.figure
  figure.draw_without_rendering()
  pixel = 72 / figure.dpi
  places = axes.transData.transform(list(ends.values()))
  moved = _apart(places[:, 1], 11 / pixel)
  texts = [
    axes.annotate(
      name,
      end,
      xytext=(6, shift * pixel),
      textcoords="offset points",
      va="center",
      fontsize="small",
      color=colours[name],
      annotation_clip=False,
      in_layout=False,
    )
    for (name, end), shift in zip(
      ends.items(), moved - places[:, 1], strict=True
    )
  ]
  box = axes.get_window_extent()
  # The factor by which lines must shrink so that each name fits after its end.
  shrink = 1.0
  for text, (x, _) in zip(texts, places, strict=True):
    room = box.width - text.get_window_extent().width - 12 / pixel
    shrink = min(shrink, room / (x - box.x0))
  scale = axes.xaxis.get_transform()
  left, right = scale.transform(axes.get_xlim())
  limits = scale.inverted().transform([left, left + (right - left) / shrink])
  axes.set_xlim(*limits)


def _apart(places: np.ndarray, gap: float) -> np.ndarray:
  """Returns the nearest places in the same order, at least a gap apart."""
  order = np.argsort(places, kind="stable")
  # Runs of neighbours that touch share their mean, as in isotonic regression.
  runs: list[list[float]] = []
  for i, place in enumerate(places[order]):
    runs.append([place - i * gap])
    while len(runs) > 1 and np.mean(runs[-2]) > np.mean(runs[-1]):
      last = runs.pop()
      runs[-1] += last
  moved = np.empty_like(places)
  moved[order] = np.concatenate([[np.mean(run)] * len(run) for run in runs])
  moved[order] += gap * np.arange(len(places))
  return moved
