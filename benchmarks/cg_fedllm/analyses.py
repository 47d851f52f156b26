"""What updates are like, and what codecs make of noise and of other data.

  FEDJAX_LLM_DATA=folder python -m benchmarks.cg_fedllm.analyses TASK

TASK is shakespeare, library or dolly; `distortion TASK` comes first. Of its
recordings with seed 0:

updates    moments, likeness between clients and rounds, principal components
ratios     signal to noise at half a bit, by CG-FedLLM's definition (Table 1)
           and the usual one
noise      noise of growing size added to updates before the codec: the mean
           squared error of what arrives to what there was without the noise
transfer   a codec that was fitted on one task's updates, on another's of the
           same model: the standard library and Dolly

To another rank, or to other layers, nothing is transferred. Axes, scales and
variances that were learned are of entries by their place. Convolutions, as the
paper's, would slide over any image: the paper's transmit nothing at home. What
learns nothing, as STC and EDEN, serves every adapter alike.
"""

import datetime
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tabulate
from matplotlib import pyplot as plt

from benchmarks import study
from benchmarks.cg_fedllm import codecs, rates, recordings
from fedjax_llm.codecs import distortion

BITS = 0.5
SIGMAS = (5e-5, 5e-4, 5e-3, 5e-2, 5e-1)
# By task, another with the same model.
OTHER = {"library": "dolly", "dolly": "library"}
CODECS = (
  "STC",
  "EDEN",
  "PCA",
  "paper's autoencoder",
  "our autoencoder",
  "our transform code",
)


def main() -> None:
  """Computes what the result file lacks, and tells and draws what is there."""
  given = study.arguments(__doc__, "cg_fedllm")
  path = given.out / f"{given.task}_analyses.json"
  if not path.exists():
    found = _analyse(given.task)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
  found = json.loads(path.read_text())
  for name, table in tables(found).items():
    print(f"{name}\n\n{table}\n")
  plot(found, given.out / f"{given.task}_noise.png")


def tables(found: dict[str, Any]) -> dict[str, str]:
  """A Markdown table for each analysis."""
  return {
    name: tabulate.tabulate(
      rows, headers="keys", tablefmt="github", disable_numparse=True
    )
    for name, rows in found["tables"].items()
  }


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
  """Errors against the noise that was added before a codec."""
  matplotlib.use("agg")
  figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
  *rows, nothing = found["tables"]["noise"]
  sigmas = [float(row["sigma"]) for row in rows]
  for name in list(rows[0])[1:]:
    axes.plot(
      sigmas,
      [float(row[name]) for row in rows],
      marker=".",
      linewidth=2 if name.startswith("our") else 1,
      label=name,
    )
  level = float(nothing["uncompressed"])
  axes.axhline(level, color="k", linestyle=":", label=nothing["sigma"])
  axes.set(
    xscale="log",
    yscale="log",
    xlabel="standard deviation of the noise of an entry",
    ylabel="mean squared error to the clean update",
    title=found["task"],
  )
  axes.legend(fontsize=7)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _analyse(task: str) -> dict[str, Any]:
  rate = rates.of(task)
  recorded = _recorded(task, rate)
  # By the same rate, so that it is the data that differ.
  other = _recorded(OTHER[task], rate) if task in OTHER else None
  receivers = {
    name: jax.jit(distortion.receiver(codec))
    for name in CODECS
    if (codec := codecs.of(name, BITS, recorded)) is not None
  }
  result = {
    "updates": _updates(recorded),
    "ratios": _ratios(recorded, receivers),
    "noise": _noise(recorded, receivers),
  }
  if other:
    result["transfer"] = _transfer(recorded, other, receivers)
  return {
    "task": task,
    "tables": result,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
  }


def _recorded(task: str, rate: float) -> recordings.Recorded:
  return recordings.of(study.Cell(task, "", 1.0, 16, 0, rate, 1.0, 0))


def _updates(recorded: recordings.Recorded) -> list[dict[str, str]]:
  """Statistics of the updates that codecs are fitted to."""
  vectors = np.asarray(recorded.fitted, np.float64)
  rounds = recorded.store.rounds[: len(vectors)]
  means = np.stack(
    [vectors[rounds == x].mean(axis=0) for x in np.unique(rounds)]
  )
  energy = np.mean(vectors**2, axis=0)
  kurtosis = np.mean(vectors**4) / np.mean(vectors**2) ** 2 - 3
  unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  alike = unit @ unit.T
  same = (rounds[:, None] == rounds) & ~np.eye(len(rounds), dtype=bool)
  after = np.sum(means[1:] * means[:-1], axis=1) / (
    np.linalg.norm(means[1:], axis=1) * np.linalg.norm(means[:-1], axis=1)
  )
  spectrum = np.linalg.eigvalsh(vectors @ vectors.T)[::-1]
  ranked = spectrum.cumsum() / spectrum.sum()
  moved = energy[energy > 0]
  values = {
    "entries of an update": f"{vectors.shape[1]:,}",
    "snapshots": str(len(vectors)),
    "root mean square": f"{np.sqrt(np.mean(vectors**2)):.2e}",
    "excess kurtosis of an entry": f"{kurtosis:.1f}",
    "cosine of two clients of a round": f"{alike[same].mean():.3f}",
    "cosine of clients of different rounds": (
      f"{alike[rounds[:, None] != rounds].mean():.3f}"
    ),
    "cosine of one round's mean and the next's": f"{after.mean():.3f}",
    "energy in the first 10 components": f"{ranked[9]:.1%}",
    "energy in the first half of the components": (
      f"{ranked[len(ranked) // 2 - 1]:.1%}"
    ),
    "geometric over arithmetic mean of entries' variances": (
      f"{np.exp(np.log(moved).mean()) / moved.mean():.3f}"
    ),
  }
  return [{"of updates": name, "": value} for name, value in values.items()]


def _ratios(recorded, receivers) -> list[dict[str, str]]:
  """Signal to noise of held-out updates."""
  members = np.concatenate(recorded.groups)
  vectors = jnp.asarray(np.asarray(recorded.store.snapshots[members]))
  rows = []
  for name, receive in {"zero": jnp.zeros_like, **receivers}.items():
    received = receive(vectors)
    error = jnp.mean((vectors - received) ** 2)
    paper = distortion.snr_of_the_paper(vectors, received)
    usual = distortion.snr_db(vectors, received)
    rows.append(
      {
        "codec": name,
        "squared norm": f"{float(jnp.sum(vectors**2, axis=1).mean()):.3g}",
        "mean squared error": f"{float(error):.3g}",
        "the paper's ratio": f"{float(paper.mean()):.3g}",
        "decibels": f"{float(usual.mean()):.2f}",
      }
    )
  return rows


def _noise(recorded, receivers) -> list[dict[str, str]]:
  """Errors to clean updates of a held-out round, of what arrives of noisy."""
  vectors = jnp.asarray(recorded.store.snapshots[recorded.groups[0]])
  rows = []
  for sigma in SIGMAS:
    noise = sigma * jax.random.normal(jax.random.key(0), vectors.shape)
    row = {"sigma": f"{sigma:g}"}
    row["uncompressed"] = f"{float(jnp.mean(noise**2)):.2e}"
    for name, receive in receivers.items():
      received = receive(vectors + noise)
      row[name] = f"{float(jnp.mean((vectors - received) ** 2)):.2e}"
    rows.append(row)
  nothing = f"{float(jnp.mean(vectors**2)):.2e}"
  rows.append({"sigma": "nothing sent", "uncompressed": nothing})
  return rows


def _transfer(recorded, other, receivers) -> list[dict[str, str]]:
  """Squared errors on held-out updates of the own task and of the other."""
  rows = []
  for name, receive in receivers.items():
    errors = [
      distortion.quality(receive, x.store.snapshots, x.groups)
      for x in (recorded, other)
    ]
    home, away = (x.relative_squared_error for x in errors)
    rows.append(
      {"codec": name, "own task": f"{home:.3f}", "other": f"{away:.3f}"}
    )
  return rows


if __name__ == "__main__":
  main()
