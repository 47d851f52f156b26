"""Plots of studies."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from fedjax_llm.reporting import studies

# What a study may vary in place of the density, with the label of its axis.
_AXES = {
  "epsilon": "epsilon (client-level privacy)",
  "dirichlet_alpha": "Dirichlet alpha (the lower, the more skewed the labels)",
}
_BYTES = "megabytes sent, both directions, all clients"
_UPLOADS = "megabytes of uploads, all clients"
_MARKERS = "osD^vP*Xhd<>"
# Of a line of the legend, in inches.
_LINE = 0.17


def plot(entries: Sequence[studies.Entry], path: pathlib.Path) -> None:
  """Draws a study.

  A study of label skew or privacy: utility at the end against that. Others, on
  the left: utility at the end against megabytes, points of a line are
  densities, bars one standard deviation over seeds, the band the dense
  reference; what is worse than the untrained model is drawn on its line, so
  that the others can be told apart. On the right: how many times fewer bytes
  than dense LoRA a method needed to be first as good as dense LoRA was on its
  way, at the best of its settings; dashed if only the values of sparse messages
  are counted. Of a study with links, simulated seconds in place of bytes; where
  downloads are alike, uploads in place of both directions.
  """
  varied = studies.shown(entries)
  axis = next((name for name in _AXES if name in varied), None)
  panels = 1 if axis else 2
  figure = matplotlib.figure.Figure(
    figsize=(3 + 6 * panels, 5.5), layout="constrained"
  )
  axes = figure.subplots(1, panels, squeeze=False)[0]
  methods = dict.fromkeys(entry.method for entry in entries)
  palette = matplotlib.colormaps["tab20"]
  colours = {name: palette(i % 20) for i, name in enumerate(methods)}
  _draw_ends(axes[0], entries, axis, colours)
  if axis is None:
    _draw_ratios(axes[1], entries, colours)
  for each in axes:
    each.grid(alpha=0.3)
  legend = figure.legend(loc="outside right upper", fontsize="small")
  lines = len(legend.get_texts())
  figure.set_figheight(max(figure.get_figheight(), (lines + 2) * _LINE))
  figure.savefig(path, dpi=150)


def _draw_ends(axes, entries, axis, colours):
  metric, higher = studies.metric_of(entries[0])
  drawn = [x for x in entries if axis is None or axis in x.cell]
  varied = studies.shown(drawn)
  of_line = set(varied) - ({axis, "task"} if axis else {"density", "task"})
  lines: dict[str, list[studies.Entry]] = {}
  for entry in drawn:
    label = entry.label([name for name in varied if name in of_line])
    lines.setdefault(label, []).append(entry)
  uploads = studies.is_of_uploads(entries)
  sent = studies.Entry.megabytes_up if uploads else studies.Entry.megabytes
  at = (lambda x: x.cell[axis]) if axis else sent
  start = drawn[0].runs[0].evaluated[0].get(metric)
  any_worse = False
  markers: dict[str, Any] = {}
  for label, points in lines.items():
    points = sorted(points, key=at)
    method = points[0].method
    marker = markers.setdefault(method, itertools.cycle(_MARKERS))
    finals = [point.final(metric) for point in points]
    means = np.array([final.mean() for final in finals])
    deviations = np.array([studies.deviation(final) for final in finals])
    if start is not None:
      is_worse = means < start if higher else means > start
      means = np.where(is_worse, start, means)
      deviations = np.where(is_worse, 0, deviations)
      any_worse |= bool(is_worse.any())
    axes.errorbar(
      [at(point) for point in points],
      means,
      yerr=deviations,
      marker=next(marker),
      color=colours[method],
      capsize=2,
      linewidth=1,
      label=label,
    )
  if any_worse:
    label = "untrained model, or worse"
    axes.axhline(start, linestyle=":", color="gray", linewidth=1, label=label)
  reference = studies.reference_of(entries[0], entries)
  if reference is not None and axis != "dirichlet_alpha":
    final = reference.final(metric)
    middle, width = final.mean(), studies.deviation(final)
    low, high = middle - width, middle + width
    axes.axhspan(low, high, color="gray", alpha=0.25, linewidth=0)
  _logarithmic(axes, "x")
  axes.set_xlabel(_AXES[axis] if axis else _UPLOADS if uploads else _BYTES)
  axes.set_ylabel(_name(metric, higher))


def _draw_ratios(axes, entries, colours):
  """The best ratio of each method at every utility that dense LoRA passed."""
  metric, higher = studies.metric_of(entries[0])
  first = studies.reference_of(entries[0], entries)
  if first is None:
    axes.set_visible(False)
    return
  costs, label = _costs(first, studies.is_of_uploads(entries))
  for style, cost in costs.items():
    levels, ratios = studies.ratios(entries, cost)
    for method, ratio in ratios.items():
      # By values, what sends all entries in few bits is no better than dense.
      if style == "-" or np.nanmax(ratio, initial=0) > 1:
        line = dict(linewidth=1.2, marker=".", markersize=4)
        axes.plot(levels, ratio, style, color=colours[method], **line)
  if not higher:
    axes.invert_xaxis()
  _logarithmic(axes, "y")
  axes.set_xlabel(f"{_name(metric, higher)} that dense LoRA passed")
  axes.set_ylabel(label)


def _costs(entry, uploads):
  """What is compared, by line style: seconds if there are links, or bytes."""
  if entry.seconds():
    label = "times fewer simulated seconds until there"
    return {"-": studies.Entry.seconds}, label
  if uploads:
    label = "times fewer bytes of uploads until there"
    return {"-": studies.Entry.megabytes_up}, label
  count = lambda x, rounds: x.as_papers_count(rounds).get("values", np.nan)
  values = lambda x, rounds: count(x, rounds) if rounds else 0.0
  label = "times fewer bytes until there (dashed: values alone)"
  return {"-": studies.Entry.megabytes, "--": values}, label


def _logarithmic(axes, which):
  getattr(axes, f"set_{which}scale")("log")
  axis = getattr(axes, f"{which}axis")
  axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
  axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  axis.set_major_formatter("{x:g}")


def _name(metric, higher):
  return "held-out accuracy" if higher else "held-out loss (nats)"
