"""How much of recorded updates arrives: squared errors and cosines by bits.

  FEDJAX_LLM_DATA=folder python -m benchmarks.cg_fedllm.distortion TASK

TASK is shakespeare, library or dolly. Updates of 20 rounds on D1 are recorded.
Learned codecs are fitted to the first 16 rounds, and all codecs are measured on
the last four. Bits are those of real messages. A second call computes what is
missing, and prints and draws all results.

The committed records have an older innovation cosine: the mean over clients of
one cosine for each. It is now one cosine of all clients of a round together,
for reasons that `compression.distortion.cosines` gives.
"""

import datetime
import importlib.metadata
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np
import tabulate

from benchmarks import study
from benchmarks.cg_fedllm import codecs, rates, recordings
from fedjax_llm.codecs import distortion
from fedjax_llm.reporting import panels

COLUMNS = {
  "relative_squared_error": "squared error",
  "aggregate_cosine": "cosine of the mean",
  "innovation_cosine": "innovation cosine",
}


# The largest error that is drawn to scale.
_TOP = 3.0


def main() -> None:
  """Measures, prints and draws."""
  given = study.arguments(__doc__, "cg_fedllm")
  path = given.out / f"{given.task}_distortion.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  for seed in range(given.seeds):
    _measure(given.task, seed, path)
  records = study.read(path)
  print(table(records))
  plot(records, path.with_suffix(".png"))


def _measure(task: str, seed: int, path: pathlib.Path) -> None:
  """Appends a line for each codec and budget that is missing in the file."""
  done = {(x["codec"], x["budget"], x["seed"]) for x in study.read(path)}
  wanted = [(name, bits) for bits in codecs.BITS for name in codecs.CODECS]
  wanted += [(name, 0.0) for name in _controls(None)]
  missing = [x for x in wanted if (*x, seed) not in done]
  if not missing:
    return
  recorded = recordings.of(
    study.Cell(task, "", 1.0, 16, seed, rates.of(task), 1.0, 0)
  )
  size = recorded.store.about["size"]
  others = _controls(recorded)
  for name, bits in missing:
    codec = others[name] if name in others else codecs.of(name, bits, recorded)
    if codec is None:
      continue
    received = jax.jit(distortion.receiver(codec))
    found = distortion.quality(
      received, recorded.store.snapshots, recorded.groups
    )
    record = {
      "task": task,
      "codec": name,
      "budget": bits,
      "seed": seed,
      "bits": 8 * distortion.nbytes(codec, size) / size,
      "entries": size,
      **found._asdict(),
      "snapshots": len(recorded.fitted),
      "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      "versions": {
        name: importlib.metadata.version(name) for name in ("fedjax-llm", "jax")
      },
      "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    study.append(path, record)
    print(f"{name:24} {bits:5} {found.relative_squared_error:.4f}", flush=True)


def _controls(recorded: recordings.Recorded | None) -> dict[str, Any]:
  """Codecs that transmit nothing."""
  make: dict[str, Callable[[Any], Any]] = {
    "constant mean": lambda x: distortion.constant_mean(
      jnp.asarray(x.mean(axis=0))
    ),
    "Gaussian noise": lambda x: distortion.gaussian_noise(
      float(np.sqrt(np.mean(np.square(x)))), x.shape[1]
    ),
  }
  if recorded is None:
    return dict.fromkeys(make)
  return {name: fn(recorded.fitted) for name, fn in make.items()}


def table(records: list[dict[str, Any]]) -> str:
  """Returns a Markdown table with a row for each codec.

  Values are means and standard deviations over seeds. A codec whose message is
  the same at a larger budget has one row.
  """
  rows: list[dict[str, str]] = []
  told = set()
  for budget, name in sorted({(x["budget"], x["codec"]) for x in records}):
    found = [x for x in records if (x["codec"], x["budget"]) == (name, budget)]
    sent = np.mean([x["bits"] for x in found])
    if (name, sent) in told:
      continue
    told.add((name, sent))
    row = {"budget": f"{budget:g}", "codec": name, "bits": f"{sent:.3f}"}
    for key, title in COLUMNS.items():
      values = np.array([x[key] for x in found])
      row[title] = f"{values.mean():.3f}"
      if values.size > 1:
        row[title] += f" ± {values.std(ddof=1):.3f}"
    rows.append(row)
  rows.sort(key=lambda row: (float(row["budget"]), -_error(row)))
  return tabulate.tabulate(
    rows, headers="keys", tablefmt="github", disable_numparse=True
  )


def _error(row: dict[str, str]) -> float:
  return float(row["squared error"].split()[0])


def plot(records: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Squared error against the bits that were sent, and Shannon's bound.

  What is far above an error of one is named at the upper edge.
  """
  figure = matplotlib.figure.Figure((panels.WIDTH, 5.5), layout="constrained")
  axes = figure.subplots()
  axes.set(
    xscale="log",
    yscale="log",
    xlim=(0.018, 2.3),
    ylim=(0.05, 1.2 * _TOP),
    xlabel="bits an entry, of real messages",
    ylabel="squared error, relative to sending nothing",
  )
  names = sorted({x["codec"] for x in records if x["budget"]})
  palette = [
    matplotlib.colormaps[name](i)
    for name in ("tab10", "Dark2")
    for i in range(8)
  ]
  bound = "bound, white Gaussian vectors"
  colours: dict[str, Any] = {bound: "black"}
  ends = {bound: (2.0, 4.0**-2)}
  for name, colour in zip(names, palette, strict=False):
    bits, errors = np.array(_curve(records, name)).T
    label = name
    if errors[-1] > _TOP:
      label = f"{name}, {errors[-1]:.1f} (off scale)"
    axes.plot(
      bits,
      np.minimum(errors, _TOP),
      marker=".",
      linewidth=2 if name.startswith("our") else 1,
      color=colour,
    )
    colours[label] = colour
    ends[label] = (bits[-1], min(errors[-1], _TOP))
  bits = np.linspace(0.02, 2, 100)
  axes.plot(bits, 4.0**-bits, "k:")
  axes.grid(alpha=0.3)
  for axis, ticks in (
    (axes.xaxis, (0.02, 0.05, 0.1, 0.25, 0.5, 1, 2)),
    (axes.yaxis, (0.05, 0.1, 0.2, 0.5, 1, 2)),
  ):
    axis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_major_formatter("{x:g}")
  panels.name_ends(axes, ends, colours)
  figure.savefig(path, dpi=150)


def _curve(records, name):
  """(bits, squared error) of a codec by its budgets, means over seeds."""
  found = [x for x in records if x["codec"] == name and x["budget"]]
  return [
    tuple(
      np.mean([x[key] for x in found if x["budget"] == budget])
      for key in ("bits", "relative_squared_error")
    )
    for budget in sorted({x["budget"] for x in found})
  ]


if __name__ == "__main__":
  main()
