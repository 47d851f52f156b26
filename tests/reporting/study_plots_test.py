import matplotlib.figure
import numpy as np
import pytest

from fedjax_llm.reporting import runs as report
from fedjax_llm.reporting import studies, study_plots


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
  """Draws entries and returns the axes."""
  seen = []
  make = matplotlib.figure.Figure.subplots

  def subplots(figure, *args, **kwargs):
    seen.append(make(figure, *args, **kwargs))
    return seen[-1]

  monkeypatch.setattr(matplotlib.figure.Figure, "subplots", subplots)

  def draw(entries):
    study_plots.plot(entries, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    return seen[-1].ravel()

  return draw


@pytest.mark.parametrize("knob", ["epsilon", "dirichlet_alpha"])
def test_a_study_of_a_knob_is_drawn_against_it(knob, drawn):
  runs = [entry("FLASC", [5.0, x + 2], **{knob: x}) for x in (1.0, 0.1)]
  (axes,) = drawn([entry("dense", [5.0, 2.0]), *runs])
  assert knob.split("_")[-1] in axes.get_xlabel()
  (line,) = [x for x in axes.get_lines() if x.get_linestyle() == "-"]
  assert list(line.get_xdata()) == [0.1, 1.0]
  assert list(line.get_ydata()) == [2.1, 3.0]


def test_ratios_are_of_the_best_setting_at_every_loss_dense_passed(drawn):
  dense = entry("dense", [5.0, 4.0, 3.0, 2.0])
  # A quarter of the bytes, and as good half as soon; a tenth, and slower.
  some = entry("FLASC", [5.0, 4.5, 4.0, 3.5], entries=25, density=1 / 4)
  few = entry("FLASC", [5.0, 4.9, 4.5, 4.0], entries=10, density=1 / 10)
  _, axes = drawn([dense, some, few])
  flat, ratios = (x for x in axes.get_lines() if x.get_linestyle() == "-")
  assert list(flat.get_ydata()) == [1, 1, 1]
  assert list(ratios.get_xdata()) == [2.0, 3.0, 4.0]
  # Loss 4: after one step of 100, two of 25 or three of 10.
  np.testing.assert_allclose(ratios.get_ydata(), [np.nan, np.nan, 10 / 3])


def test_over_links_seconds_are_compared(drawn):
  dense = entry("dense", [5.0, 4.0, 3.0], simulated_seconds=8.0)
  some = entry("FLASC", [5.0, 4.5, 4.0], simulated_seconds=1.0)
  _, axes = drawn([dense, some])
  _, ratios = axes.get_lines()
  assert "simulated seconds" in axes.get_ylabel()
  np.testing.assert_allclose(ratios.get_ydata(), [np.nan, 4])


def test_without_a_dense_run_there_are_no_ratios(drawn):
  _, axes = drawn([entry("FLASC", [5.0, 4.0])])
  assert not axes.get_visible()


def test_what_is_worse_than_the_untrained_model_is_drawn_on_its_line(drawn):
  dense, good, bad = [5.0, 2.0], [5.0, 3.0], [5.0, 99.0]
  axes, _ = drawn(
    [entry("dense", dense), entry("good", good), entry("bad", bad)]
  )
  lines = {x.get_label(): x for x in axes.containers}
  heights = {name: x[0].get_ydata()[0] for name, x in lines.items()}
  assert heights == {"dense": 2, "good": 3, "bad": 5}
  (base,) = [x for x in axes.get_lines() if x.get_linestyle() == ":"]
  assert set(base.get_ydata()) == {5}
  assert axes.get_ylim()[1] < 6
