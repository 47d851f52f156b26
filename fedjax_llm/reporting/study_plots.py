"""Plots of studies: a panel for each method, the other methods in gray behind.

No legend of methods is needed. `ends` draws utility against bytes. `ratios`
draws how many times fewer bytes than dense LoRA a method needed.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from fedjax_llm.reporting import panels, studies

# What a study may vary instead of the density: its name -> label of the axis.
_AXES = {
  "epsilon": "epsilon (privacy of whole clients; less is more private)",
  "dirichlet_alpha": "Dirichlet alpha (less is more skewed labels)",
}
_BYTES = "megabytes sent, both directions, all clients"
_UPLOADS = "megabytes of uploads, all clients"
# Settings that change the length of messages. The axis of bytes shows them.
_LENGTHS = {"density", "bits"}
_RATES = {"server_rate", "client_rate"}
_WORDS = {"server_decay": "falling server rate", "place": "noise added"}
_MARKERS = "osD^vP*Xhd<>"
_GRAY = "0.8"
# The least number of entries for which outliers are looked for.
_SEVERAL = 8


def ends(entries: Sequence[studies.Entry], path: pathlib.Path) -> None:
  """Draws the utility at the end of each run.

  The horizontal axis shows megabytes of all messages, or of uploads only if all
  methods download the same. In a study of privacy or label skew it shows
  epsilon or alpha. Points are means over seeds, bars are one standard
  deviation, and the band is the dense reference. Points of one setting are
  joined. An outlier is an arrow at the edge, with its value beside it.
  """
  axis = _axis(entries)
  drawn = [x for x in entries if axis is None or axis in x.cell]
  uploads = studies.is_of_uploads(entries)
  sent = studies.Entry.megabytes_up if uploads else studies.Entry.megabytes
  at = (lambda x: x.cell[axis]) if axis else sent
  metric, higher = studies.metric_of(entries[0])
  methods = list(dict.fromkeys(x.method for x in drawn))
  figure, by_method = panels.grid(
    methods,
    _AXES[axis] if axis else _UPLOADS if uploads else _BYTES,
    _name(metric, higher),
  )
  reference = studies.reference_of(entries[0], entries)
  band = None
  if reference is not None and axis != "dirichlet_alpha":
    final = reference.final(metric)
    middle, width = final.mean(), studies.deviation(final)
    band = (middle - width, middle + width)
  styles = _styles(drawn, axis)
  limits = _limits(drawn, metric, higher, band)
  means = {id(x): x.final(metric).mean() for x in drawn}
  for method, axes in by_method.items():
    if band:
      axes.axhspan(*band, color="tab:blue", alpha=0.2, linewidth=0)
      axes.axhline(np.mean(band), color="tab:blue", alpha=0.4, linewidth=1)
    others = [x for x in drawn if x.method != method]
    axes.plot(
      [at(x) for x in others],
      np.clip([means[id(x)] for x in others], *limits),
      "o",
      color=_GRAY,
      markersize=3,
      zorder=1,
    )
    own = [x for x in drawn if x.method == method]
    for style in styles:
      some = [x for x in own if _setting(x, drawn, axis) == style]
      if some:
        some.sort(key=at)
        _draw_line(axes, some, at, metric, limits, styles[style])
    _tell_off_scale(axes, own, metric, limits)
  panels.logarithmic(axes, "x", [at(x) for x in drawn])
  room = 0.06 * (limits[1] - limits[0])
  if room:
    axes.set_ylim(limits[0] - room, limits[1] + room)
  _add_legend(figure, styles, band is not None)
  figure.savefig(path, dpi=150)


def _draw_line(axes, points, at, metric, limits, style):
  """Draws the points of one method and setting, from left to right."""
  finals = [x.final(metric) for x in points]
  means = np.array([x.mean() for x in finals])
  places = np.array([at(x) for x in points])
  is_inside = (limits[0] <= means) & (means <= limits[1])
  # Points at one place, such as runs with several rates, are not joined.
  is_line = is_inside.all() and len(set(places.round(1))) == len(places)
  axes.errorbar(
    places[is_inside],
    means[is_inside],
    yerr=np.array([studies.deviation(x) for x in finals])[is_inside],
    linestyle="-" if is_line else "none",
    linewidth=1,
    capsize=2,
    markersize=5,
    **style,
  )
  for place, mean in zip(places[~is_inside], means[~is_inside], strict=True):
    low, high = limits
    edge, marker = (high, "^") if mean > high else (low, "v")
    axes.plot(place, edge, marker, color=style["color"], markersize=5)


def _tell_off_scale(axes, entries, metric, limits):
  """Writes the values that are off the scale at the edge of a panel."""
  means = [x.final(metric).mean() for x in entries]
  off = sorted(x for x in means if not limits[0] <= x <= limits[1])
  if not off:
    return
  at_top = off[-1] > limits[1]
  axes.text(
    0.97,
    0.85 if at_top else 0.15,
    ", ".join(f"{x:.2f}" for x in off),
    transform=axes.transAxes,
    ha="right",
    va="top" if at_top else "bottom",
    fontsize="x-small",
    bbox={"color": "white", "pad": 1, "alpha": 0.8},
  )


def _limits(drawn, metric, higher, band):
  """Returns the range of the vertical axis, (low, high).

  It leaves out outliers, and entries worse than the untrained model, if this
  shortens the range by a quarter or more.
  """
  sign = 1 if higher else -1
  finals = [entry.final(metric) for entry in drawn]
  means = np.array([sign * x.mean() for x in finals])
  worst = means.min()
  if len(means) >= _SEVERAL:
    low, high = np.percentile(means, [25, 75])
    worst = max(worst, low - 1.5 * (high - low))
  start = drawn[0].runs[0].evaluated[0].get(metric)
  if start is not None:
    worst = max(worst, min(sign * start, means.max()))
  if worst - means.min() < (means.max() - means.min()) / 4:
    worst = means.min()
  bounds = [sign * worst, *(band or ())]
  for final, mean in zip(finals, means, strict=True):
    if mean >= worst:
      width = studies.deviation(final)
      bounds += [final.mean() - width, final.mean() + width]
  return min(bounds), max(bounds)


def _setting(entry, drawn, axis):
  """Returns, in words, the settings that distinguish entries of one method."""
  hidden = {axis, "task", *_RATES} if axis else {"task", *_LENGTHS, *_RATES}
  names = [x for x in studies.shown(drawn) if x not in hidden]
  said = []
  for name in names:
    value = entry.cell.get(name)
    words = _WORDS.get(name, name.replace("_", " "))
    if value is True:
      said.append(words)
    elif value not in (None, False):
      said.append(f"{words} {studies.short(value)}")
  return ", ".join(said)


def _styles(drawn, axis):
  """Returns a colour and a marker for each setting, in order of their names."""
  settings = sorted({_setting(x, drawn, axis) for x in drawn})
  colours = matplotlib.colormaps["tab10"]
  # Blue is the reference.
  return {
    name: {
      "color": colours(1 + i % 9),
      "marker": _MARKERS[i % len(_MARKERS)],
    }
    for i, name in enumerate(settings)
  }


def _add_legend(figure, styles, has_band):
  """Draws a legend of the settings; if there are many, of the first ones."""
  made: list[tuple[Any, str]] = []
  if has_band:
    patch = matplotlib.patches.Patch(color="tab:blue", alpha=0.3, linewidth=0)
    made.append((patch, "dense LoRA, ± one deviation"))
  other = matplotlib.lines.Line2D(
    [], [], color=_GRAY, marker="o", markersize=3, linestyle="none"
  )
  made.append((other, "other methods"))
  if len(styles) > 1:
    room = panels.LEGEND - len(made)
    made += [
      (
        matplotlib.lines.Line2D([], [], linestyle="none", **style),
        name or "plain",
      )
      for name, style in list(styles.items())[:room]
    ]
  handles, labels = zip(*made, strict=True)
  columns = min(3, len(made))
  figure.legend(
    handles,
    labels,
    loc="outside upper center",
    ncols=columns,
    fontsize="small",
    frameon=False,
  )


def has_ratios(entries: Sequence[studies.Entry]) -> bool:
  """Returns whether `ratios` can be drawn.

  It needs dense runs, and a study that varies messages.
  """
  are_dense = any(entry.method == studies.REFERENCE for entry in entries)
  return are_dense and _axis(entries) is None


def _axis(entries):
  """Returns what the study varies instead of messages; None if nothing."""
  varied = studies.shown(entries)
  return next((name for name in _AXES if name in varied), None)


def ratios(entries: Sequence[studies.Entry], path: pathlib.Path) -> None:
  """Draws how many times fewer bytes than dense LoRA a method needed.

  There is a point for each utility that dense LoRA reached during training. It
  shows the best of the method's settings. A study with links compares simulated
  seconds instead of bytes. If all methods download the same, only uploads
  count. The title names the methods that reached none of these utilities.

  Raises:
    ValueError: if there is no dense run.
  """
  metric, higher = studies.metric_of(entries[0])
  cost, label = _cost(entries)
  levels, of_methods = studies.ratios(entries, cost)
  known = {x: ratio for x, ratio in of_methods.items() if _is_some(ratio)}
  never = [x for x in of_methods if x not in known]
  figure, by_method = panels.grid(
    list(known), f"{_name(metric, higher)} that dense LoRA passed", label
  )
  for method, axes in by_method.items():
    axes.axhline(1, color="tab:blue", alpha=0.4, linewidth=1)
    for other, ratio in known.items():
      if other != method:
        axes.plot(levels, ratio, color=_GRAY, linewidth=0.8, zorder=1)
    axes.plot(
      levels, known[method], color="tab:orange", marker="o", markersize=3
    )
  if not higher:
    axes.invert_xaxis()
  found = np.concatenate(list(known.values()))
  panels.logarithmic(axes, "y", found[np.isfinite(found)].tolist())
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
  if never:
    text = f"never as good as dense LoRA on its way: {'; '.join(never)}"
    figure.suptitle(text, fontsize="small", wrap=True)
  figure.savefig(path, dpi=150)


def _is_some(ratio):
  return bool(np.isfinite(ratio).any())


def _cost(entries):
  """Returns what is compared (seconds if there are links), and its label."""
  if entries[0].seconds():
    return studies.Entry.seconds, "times fewer simulated seconds"
  if studies.is_of_uploads(entries):
    return studies.Entry.megabytes_up, "times fewer bytes of uploads"
  return studies.Entry.megabytes, "times fewer bytes"


def _name(metric, higher):
  return "held-out accuracy" if higher else "held-out loss (nats)"
