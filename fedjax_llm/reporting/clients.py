"""A table and a plot of the examples that each client has."""

import pathlib

import matplotlib.axes
import matplotlib.colors
import matplotlib.figure
import matplotlib.ticker
import numpy as np
import tabulate

from fedjax_llm.data import batches

# The largest number of clients or labels that are named on an axis.
_MOST_NAMES = 40
# The largest number of letters on an axis before names are turned upright.
_MOST_LETTERS = 90
# The largest ratio of sizes on a linear axis; above it the axis is logarithmic.
_LINEAR = 30
_BINS = 30


def table(population: batches.Population, *, name: str) -> str:
  """Returns a Markdown table of the numbers of clients, examples and tokens.

  Tokens are those that are predicted; for a classifier, those that it reads.

  Args:
    population: the clients and their rows.
    name: the heading of the table.
  """
  examples, sizes = population.examples, np.diff(population.starts)
  counted = (
    examples.segments > 0
    if isinstance(examples, batches.Labelled)
    else examples.mask
  )
  rows = {
    "clients": f"{sizes.size:,}",
    "examples": f"{sizes.sum():,}",
    "dropped examples": f"{population.dropped:,}",
    "tokens": f"{counted.sum():,}",
    "examples of a client, least": f"{sizes.min():,}",
    "median": f"{np.median(sizes):,.10g}",
    "most": f"{sizes.max():,}",
  }
  if population.labels is not None:
    held = label_counts(population) > 0
    rows["labels"] = f"{held.any(axis=0).sum():,}"
    rows["labels of a client, mean"] = f"{held.sum(axis=1).mean():.1f}"
  return tabulate.tabulate(
    rows.items(),
    headers=("", name),
    tablefmt="github",
    colalign=("left", "right"),
    disable_numparse=True,
  )


def label_counts(population: batches.Population) -> np.ndarray:
  """Returns the number of examples by client and label, [clients, labels].

  Raises:
    ValueError: if the population has no labels.
  """
  if population.labels is None:
    raise ValueError(
      "expected a population with labels, got one without. Give a label_column."
    )
  clients = np.diff(population.starts).size
  labels = max(len(population.label_names), population.labels.max() + 1)
  owners = np.repeat(np.arange(clients), np.diff(population.starts))
  cells = np.bincount(
    owners * labels + population.labels, minlength=clients * labels
  )
  return cells.reshape(clients, labels)


def plot(
  population: batches.Population, path: pathlib.Path, *, name: str
) -> None:
  """Draws a histogram of the clients' sizes, and their labels if they have any.

  The upper plot has a column for each client, with the shares of the labels in
  its examples as colours. Clients are sorted by their most common label.

  Args:
    population: the clients and their rows.
    path: the image file to write.
    name: the start of the title.
  """
  sizes = np.diff(population.starts)
  labelled = population.labels is not None
  heights = [2.2]
  if labelled:
    heights = [np.clip(0.22 * label_counts(population).shape[1], 2.2, 8), 2.2]
  figure = matplotlib.figure.Figure(
    figsize=(9, sum(heights) + 1.3), layout="constrained"
  )
  axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)
  if labelled:
    _plot_labels(figure, axes[0, 0], population)
  _plot_sizes(axes[-1, 0], sizes)
  figure.suptitle(f"{name}: {sizes.size:,} clients, {sizes.sum():,} examples")
  figure.savefig(path, dpi=150)


def _plot_labels(
  figure: matplotlib.figure.Figure,
  axes: matplotlib.axes.Axes,
  population: batches.Population,
) -> None:
  counts = label_counts(population)
  shares = counts / counts.sum(axis=1, keepdims=True)
  order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
  clients, labels = shares.shape
  mesh = axes.pcolormesh(
    np.ma.masked_equal(shares[order].T, 0),
    cmap="Blues",
    # Makes a few examples of a label visible beside hundreds of another.
    norm=matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=1),
    edgecolors="white",
    linewidth=1 if clients <= _MOST_NAMES else 0,
  )
  bar = figure.colorbar(mesh, ax=axes, pad=0.01, format="{x:.0%}")
  bar.set_label("share of the client's examples")
  if clients <= _MOST_NAMES:
    names = [_short(population.names[i], 16) for i in order]
    upright = clients * (1 + max(map(len, names))) > _MOST_LETTERS
    axes.set_xticks(
      np.arange(clients) + 0.5,
      names,
      rotation=90 if upright else 0,
      fontsize="small",
    )
  else:
    axes.set_xticks([])
  axes.set_xlabel("clients, by the label that they have most of")
  names = population.label_names or tuple(map(str, range(labels)))
  if labels <= _MOST_NAMES:
    axes.set_yticks(
      np.arange(labels) + 0.5, [_short(name, 28) for name in names]
    )
  axes.set_ylabel("label")
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.invert_yaxis()


def _plot_sizes(axes: matplotlib.axes.Axes, sizes: np.ndarray) -> None:
  least, most = sizes.min(), sizes.max()
  if most > _LINEAR * least:
    edges = np.unique(np.geomspace(least, most + 1, _BINS).astype(int))
    axes.set_xscale("log")
  else:
    width = -(-(most - least + 1) // _BINS)
    edges = np.arange(least, most + width + 1, width)
    axes.xaxis.set_major_locator(
      matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1)
    )
  axes.xaxis.set_major_formatter("{x:,.0f}")
  bins = (edges - 0.5).tolist()  # Whole numbers lie inside the bars.
  axes.hist(sizes, bins, color="C0", edgecolor="white", linewidth=0.5)
  median = np.median(sizes)
  axes.axvline(
    median, color="black", linestyle=":", label=f"median {median:,.10g}"
  )
  axes.margins(y=0.15)
  axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
  axes.set_xlabel("examples of a client")
  axes.set_ylabel("clients")
  axes.grid(axis="y", alpha=0.3)
  axes.set_axisbelow(True)
  axes.legend()


def _short(name: str, length: int) -> str:
  return name if len(name) <= length else f"{name[: length - 1]}…"
