"""What updates look like, and how codecs treat noise and other data.

  FEDJAX_LLM_DATA=folder python -m benchmarks.cg_fedllm.analyses TASK

TASK is shakespeare, library or dolly; run `distortion TASK` first. It analyses
the recording with seed 0:

updates    moments, similarity of clients and of rounds, principal components
ratios     signal-to-noise ratio at half a bit, by CG-FedLLM's definition (Table
           1) and by the usual one
noise      noise of growing size is added to updates before the codec; the mean
           squared error is between what arrives and the update without noise
transfer   a codec fitted to the updates of one task codes those of another task
           with the same model: the standard library and Dolly

Learned axes, scales and variances belong to entries by their place, so no codec
is transferred to another rank or to other layers. The paper's convolutions
would fit any image, but they transmit nothing on their own task. Codecs that
learn nothing, such as STC and EDEN, serve every adapter.
"""

import datetime
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tabulate

from benchmarks import study
from benchmarks.cg_fedllm import codecs, rates, recordings
from fedjax_llm.codecs import distortion
from fedjax_llm.reporting import panels

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
  """Computes the results if they are missing, prints and draws them."""
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
  """Returns a Markdown table for each analysis."""
  return {
    name: tabulate.tabulate(
      rows, headers="keys", tablefmt="github", disable_numparse=True
    )
    for name, rows in found["tables"].items()
  }


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
  """Errors against the noise that was added before a codec, a panel a codec."""
  *rows, nothing = found["tables"]["noise"]
  names = list(rows[0])[1:]
  figure, by_name = panels.grid(
    names,
    "standard deviation of the noise added to an entry",
    "mean squared error to the clean update",
  )
  sigmas = [float(row["sigma"]) for row in rows]
  errors = {name: [float(row[name]) for row in rows] for name in names}
  level = float(nothing["uncompressed"])
  for name, axes in by_name.items():
    for other in names:
      axes.plot(sigmas, errors[other], color="0.8", linewidth=0.8, zorder=1)
    axes.plot(sigmas, errors[name], marker="o", markersize=3)
    axes.axhline(level, color="k", linestyle=":", linewidth=1)
    axes.annotate(
      nothing["sigma"], (sigmas[0], 1.2 * level), fontsize="x-small"
    )
    # Uncompressed updates leave it: their error is that of the noise.
    axes.set(xscale="log", yscale="log", ylim=(level / 10, 1))
  figure.savefig(path, dpi=150)


def _analyse(task: str) -> dict[str, Any]:
  rate = rates.of(task)
  recorded = _recorded(task, rate)
  # With the same learning rate, so that only the data differ.
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
  """Errors of what arrives of noisy updates, to the updates without noise."""
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
  """Squared errors on held-out updates of the same task and of the other."""
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
