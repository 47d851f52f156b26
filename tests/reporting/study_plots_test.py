import numpy as np
import pytest

from fedjax_llm.reporting import panels, studies, study_plots
from fedjax_llm.reporting import runs as report


def entry(method, losses, *, entries=100, simulated_seconds=0.0, **settings):
  """A study's entry of one seed, with two rounds between evaluations."""
  settings = {"density": 1.0, "rank": 16, "rounds": 6} | settings
  sent = {
    "download_bytes": 40 * entries,
    "upload_bytes": 40 * entries,
    "download_entries": 10 * entries,
    "upload_entries": 10 * entries,
    "sparse_messages": 0,
    "sparse_entries": 0,
    "trainable": 100,
    "simulated_seconds": simulated_seconds,
  }
  lines = [
    {"round": 2 * i, "loss": loss, "perplexity": 1.0, **(sent if i else {})}
    for i, loss in enumerate(losses)
  ]
  cell = {"task": "toy", "method": method, **settings}
  run = report.Run(method, None, {}, lines)
  return studies.Entry(method, cell, (run,))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
  """Draws entries and returns the figure and the axes by title."""
  seen = []
  make = panels.grid

  def grid(*args):
    seen.append(make(*args))
    return seen[-1]

  monkeypatch.setattr(panels, "grid", grid)

  def draw(plot, entries):
    plot(entries, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    return seen[-1]

  return draw


def points(axes):
  """What is drawn of the panel's own method, (x, y), a line each."""
  return [
    (list(x.lines[0].get_xdata()), list(x.lines[0].get_ydata()))
    for x in axes.containers
    if x.lines[0].get_xdata().size
  ]


@pytest.mark.parametrize("knob", ["epsilon", "dirichlet_alpha"])
def test_a_study_of_a_knob_is_drawn_against_it(knob, drawn):
  runs = [entry("FLASC", [5.0, x + 2], **{knob: x}) for x in (1.0, 0.1)]
  figure, axes = drawn(study_plots.ends, [entry("dense", [5.0, 2.0]), *runs])
  assert knob.split("_")[-1] in figure.get_supxlabel()
  assert points(axes["FLASC"]) == [([0.1, 1.0], [2.1, 3.0])]


def test_a_method_has_a_panel_with_the_others_in_gray(drawn):
  runs = [entry("dense", [5.0, 2.0]), entry("FLASC", [5.0, 3.0], entries=10)]
  _, axes = drawn(study_plots.ends, runs)
  assert list(axes) == ["dense", "FLASC"]
  assert points(axes["dense"]) == [([8e-3], [2.0])]
  assert points(axes["FLASC"]) == [([8e-4], [3.0])]
  (gray,) = [x for x in axes["FLASC"].lines if x.get_color() == "0.8"]
  assert list(gray.get_ydata()) == [2.0]


def test_settings_are_told_apart_in_words_and_their_densities_are_a_line(drawn):
  runs = [entry("dense", [5.0, 2.0])]
  for steps in (4, 16):
    for entries, density in ((25, 1 / 4), (5, 1 / 16)):
      setting = {"density": density, "local_steps": steps, "decay": steps > 4}
      runs.append(entry("FLASC", [5.0, 3.0], entries=entries, **setting))
  figure, axes = drawn(study_plots.ends, runs)
  assert [len(x) for x, _ in points(axes["FLASC"])] == [2, 2]
  (legend,) = figure.legends
  told = [x.get_text() for x in legend.get_texts()]
  assert {"plain", "local steps 16, decay", "local steps 4"} <= set(told)


def test_a_legend_never_has_more_than_twelve_entries(drawn):
  runs = [entry("dense", [5.0, 2.0], knob=x) for x in range(40)]
  figure, _ = drawn(study_plots.ends, runs)
  (legend,) = figure.legends
  assert len(legend.get_texts()) == 12


def test_outliers_are_told_at_the_edge_and_do_not_squeeze_the_axis(drawn):
  good = [entry(f"good {x}", [90.0, 3 + x / 10]) for x in range(8)]
  bad = entry("bad", [90.0, 77.125])
  _, axes = drawn(study_plots.ends, [entry("dense", [90.0, 2.0]), *good, bad])
  low, high = axes["bad"].get_ylim()
  assert low < 2 and 3.7 < high < 10
  (arrow,) = [x for x in axes["bad"].lines if x.get_marker() == "^"]
  assert low < arrow.get_ydata()[0] < high
  assert [x.get_text() for x in axes["bad"].texts] == ["77.12"]
  assert not axes["good 0"].texts


def test_what_is_worse_than_the_untrained_model_is_drawn_at_the_edge(drawn):
  runs = [entry("dense", [5.0, 2.0]), entry("bad", [5.0, 99.0])]
  _, axes = drawn(study_plots.ends, runs)
  assert 5 <= axes["bad"].get_ylim()[1] < 6
  assert [x.get_text() for x in axes["bad"].texts] == ["99.00"]


def test_ratios_are_of_the_best_setting_at_every_loss_dense_passed(drawn):
  dense = entry("dense", [5.0, 4.0, 3.0, 2.0])
  # A quarter of the bytes, and as good half as soon; a tenth, and slower.
  some = entry("FLASC", [5.0, 4.5, 4.0, 3.5], entries=25, density=1 / 4)
  few = entry("FLASC", [5.0, 4.9, 4.5, 4.0], entries=10, density=1 / 10)
  _, axes = drawn(study_plots.ratios, [dense, some, few])
  flat, ratios = (axes[x].get_lines()[-1] for x in ("dense", "FLASC"))
  assert list(flat.get_ydata()) == [1, 1, 1]
  assert list(ratios.get_xdata()) == [2.0, 3.0, 4.0]
  # Loss 4: after one step of 100, two of 25 or three of 10.
  np.testing.assert_allclose(ratios.get_ydata(), [np.nan, np.nan, 10 / 3])


def test_over_links_seconds_are_compared(drawn):
  dense = entry("dense", [5.0, 4.0, 3.0], simulated_seconds=8.0)
  some = entry("FLASC", [5.0, 4.5, 4.0], simulated_seconds=1.0)
  figure, axes = drawn(study_plots.ratios, [dense, some])
  assert "simulated seconds" in figure.get_supylabel()
  np.testing.assert_allclose(
    axes["FLASC"].get_lines()[-1].get_ydata(), [np.nan, 4]
  )


def test_methods_that_were_never_as_good_are_named(drawn):
  runs = [entry("dense", [5.0, 4.0]), entry("FLASC", [5.0, 4.5])]
  figure, axes = drawn(study_plots.ratios, runs)
  assert list(axes) == ["dense"]
  assert figure.get_suptitle().endswith(": FLASC")


def test_ratios_are_for_studies_of_messages_with_a_dense_run():
  dense, sparse = entry("dense", [5.0, 4.0]), entry("FLASC", [5.0, 4.0])
  private = entry("dense, private", [5.0, 4.5], epsilon=2.0)
  assert study_plots.has_ratios([dense, sparse])
  assert not study_plots.has_ratios([sparse])
  assert not study_plots.has_ratios([dense, private])


def test_without_a_dense_run_there_are_no_ratios(tmp_path):
  with pytest.raises(ValueError, match="expected entries of dense"):
    study_plots.ratios([entry("FLASC", [5.0, 4.0])], tmp_path / "toy.png")
