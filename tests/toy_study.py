"""Records of a study with 10 clients, and 2 rounds between evaluations."""

import json


def record(method, seed, losses, *, density=1.0, rank=16, entries=100, **more):
  """A run with these losses, and messages of so many entries."""
  cell = dict(task="toy", method=method, density=density, rank=rank, seed=seed)
  cell |= dict(client_rate=0.1, server_rate=0.1, rounds=2 * len(losses))
  cell["knobs"] = list(more.items())
  lines = [{"round": 0, "loss": 5.0, "perplexity": 1.0}]
  lines += [
    {
      "round": 2 * i + 2,
      "loss": loss,
      "perplexity": 1.0,
      "download_bytes": 10 * (4 * entries + 5),
      "upload_bytes": 10 * (4 * entries + 5),
      "download_entries": 10 * entries,
      "upload_entries": 10 * entries,
      "sparse_messages": 20 * (entries < 100),
      "sparse_entries": 20 * entries * (entries < 100),
      "trainable": 100,
    }
    for i, loss in enumerate(losses)
  ]
  return {"cell": cell, "lines": lines}


DENSE = [record("dense", 1, [4.0, 3.0, 2.2]), record("dense", 0, [4.0, 3, 2])]
SPARSE = [
  record("FLASC", seed, [4.5, 3.5, 2.1 + seed / 10], density=1 / 16, entries=6)
  for seed in range(3)
]


def write(path, records):
  """Writes a result file, and returns its path."""
  path.write_text("".join(json.dumps(x) + "\n" for x in records))
  return path
