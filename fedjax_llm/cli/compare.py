"""`fedjax-llm compare`: finished runs and studies in one table and plot."""

import pathlib

import tyro

from fedjax_llm.reporting import runs as report
from fedjax_llm.reporting import studies, study_plots, study_tables


def compare(
  runs: tyro.conf.Positional[tuple[pathlib.Path, ...]],
  /,
  *,
  out: pathlib.Path = pathlib.Path("compare.png"),
  target_loss: float | None = None,
  target_accuracy: float | None = None,
  conventions: bool = False,
) -> None:
  """Compare finished runs: a table and a plot of utility against bytes.

  Args:
    runs: run folders, or folders of run folders; or a study, a file of JSON
      lines, whose runs are summed up by mean and deviation over seeds.
    out: where to draw the plot. A study gets a second one, with `_ratios` after
      the name: how many times fewer bytes than dense LoRA each method needed.
    target_loss: the held-out loss to reach. Adds columns with the bytes and the
      simulated seconds until an evaluation first reaches it. Not for a study.
    target_accuracy: the accuracy to reach, in [0, 1], likewise.
    conventions: add columns with the bytes as papers count them: values alone,
      values and a bitmap, values and COO indices.
  """
  if not runs:
    raise ValueError("compare expected one or more run folders, got none.")
  if all(map(studies.is_study, runs)):
    if target_loss is not None or target_accuracy is not None:
      raise ValueError(
        "the target of a study is the utility of its dense runs, got"
        f" {target_loss=}, {target_accuracy=}. Leave them out."
      )
    entries = [entry for path in runs for entry in studies.load(path)]
    study_plots.ends(entries, out)
    drawn = [out]
    print(study_tables.table(entries, papers=conventions))
    if study_plots.has_ratios(entries):
      drawn.append(out.with_stem(f"{out.stem}_ratios"))
      study_plots.ratios(entries, drawn[-1])
      of = " of uploads" if studies.is_of_uploads(entries) else ""
      print(f"\nHow many times fewer bytes{of} than dense, at equal utility:\n")
      print(study_tables.ratio_table(entries))
    print(f"\nPlot: {', '.join(map(str, drawn))}")
    return
  loaded = [run for folder in runs for run in report.load(folder)]
  report.plot(loaded, out)
  given = {"loss": target_loss, "accuracy": target_accuracy}
  targets = {metric: x for metric, x in given.items() if x is not None}
  shown = report.table(loaded, targets=targets, papers=conventions)
  print(f"{shown}\n\nPlot: {out}")
