"""Markdown tables of studies."""

from collections.abc import Sequence

import numpy as np
import tabulate

from fedjax_llm.reporting import studies


def table(entries: Sequence[studies.Entry], *, papers: bool = False) -> str:
  """Returns a Markdown table: utility, bytes, and a comparison with dense runs.

  The columns "to dense" count until the first evaluation that meets the target:
  its mean over seeds is at most one standard deviation worse than the final
  mean of `studies.reference_of`. A ratio is the bytes of the reference until it
  met that target itself, divided by the bytes of the entry.

  Args:
    entries: the entries, one for each row.
    papers: whether to add the ratios by the `runs.conventions` of papers.
  """
  rows = []
  for entry in entries:
    metric, higher = studies.metric_of(entry)
    reference = studies.reference_of(entry, entries)
    final = entry.final(metric)
    form = ".1%" if higher else ".3f"
    row = {
      name: studies.short(entry.cell.get(name, ""))
      for name in studies.shown(entries)
    }
    row["seeds"] = str(len(final))
    row[metric] = f"{final.mean():{form}} ± {studies.deviation(final):{form}}"
    row["MB"] = f"{entry.megabytes():.2f}"
    if entry.seconds():
      row["simulated s"] = f"{entry.seconds():.0f}"
    if reference is not None:
      row |= _against(entry, reference, papers)
    rows.append({"method": entry.method, **row})
  return tabulate.tabulate(rows, headers="keys", tablefmt="github")


def _against(entry, reference, papers):
  metric, higher = studies.metric_of(entry)
  target = studies.target_of(reference, metric, higher)
  own, theirs = (
    studies.rounds_to(x, target, metric, higher) for x in (entry, reference)
  )
  columns = {"× fewer": f"{reference.megabytes() / entry.megabytes():.1f}"}
  up = reference.megabytes_up() / entry.megabytes_up()
  columns["× fewer up"] = f"{up:.1f}"
  if papers:
    columns |= _as_papers_count(entry, reference, "× fewer")
  columns |= {"MB to dense": "not met", "× fewer to dense": ""}
  if own is not None:
    sent = entry.megabytes(own)
    columns["MB to dense"] = f"{sent:.2f}"
    columns["× fewer to dense"] = f"{reference.megabytes(theirs) / sent:.1f}"
    if papers:
      columns |= _as_papers_count(
        entry, reference, "× fewer to dense", own, theirs
      )
    if entry.seconds():
      columns["simulated s to dense"] = f"{entry.seconds(own):.0f}"
  return columns


def _as_papers_count(entry, reference, name, own=None, theirs=None):
  counted, dense = (
    entry.as_papers_count(own),
    reference.as_papers_count(theirs),
  )
  return {f"{name}, {x}": f"{dense[x] / counted[x]:.1f}" for x in counted}


def ratio_table(entries: Sequence[studies.Entry]) -> str:
  """Returns a Markdown table of `studies.ratios` by real bytes.

  The first row is the best level. If the entries differ in uploads alone, only
  upload bytes count.
  """
  metric, higher = studies.metric_of(entries[0])
  uploads = studies.is_of_uploads(entries)
  cost = studies.Entry.megabytes_up if uploads else studies.Entry.megabytes
  levels, of_methods = studies.ratios(entries, cost)
  order = np.argsort(-levels if higher else levels)
  form = ".1%" if higher else ".3f"
  rows = [
    {metric: f"{levels[i]:{form}}"}
    | {
      method: "" if np.isnan(ratio[i]) else f"{ratio[i]:.1f}"
      for method, ratio in of_methods.items()
      if np.isfinite(ratio).any()
    }
    for i in order
  ]
  return tabulate.tabulate(
    rows, headers="keys", tablefmt="github", disable_numparse=True
  )
