import itertools

import matplotlib.figure
import numpy as np
import pytest

from fedjax_llm.reporting import panels


@pytest.fixture
def axes():
  return matplotlib.figure.Figure((6, 4)).subplots()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 13])
def test_a_grid_has_an_axis_for_each_name_and_ticks_below_each_column(count):
  names = [f"method {i}" for i in range(count)]
  figure, by_name = panels.grid(names, "bytes", "loss")
  assert list(by_name) == names
  assert figure.get_figwidth() == panels.WIDTH
  visible = [x for x in figure.axes if x.get_visible()]
  assert visible == list(by_name.values())
  columns = min(4, count)
  is_told = [x.xaxis.get_tick_params()["labelbottom"] for x in by_name.values()]
  assert is_told == [i >= count - columns for i in range(count)]


@pytest.mark.parametrize(
  "values, scale", [([1.0, 3.0], "linear"), ([1.0, 30.0, 1000.0], "log")]
)
def test_an_axis_is_logarithmic_if_it_spans_enough(axes, values, scale):
  axes.plot(values, values)
  panels.logarithmic(axes, "x", values)
  assert axes.get_xscale() == scale
  axes.figure.draw_without_rendering()
  told = [x.get_text() for x in axes.get_xticklabels() if x.get_text()]
  assert told and all(float(x) for x in told)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_names_at_ends_neither_overlap_nor_leave_the_axes(axes, scale):
  axes.set_xscale(scale)
  ends = {f"a rather long name, {i}": (10.0, 1 + i / 1000) for i in range(5)}
  for end in ends.values():
    axes.plot([1.0, end[0]], [5.0, end[1]])
  panels.name_ends(axes, ends, dict.fromkeys(ends, "black"))
  axes.figure.draw_without_rendering()
  boxes = [x.get_window_extent() for x in axes.texts]
  frame = axes.get_window_extent()
  assert len(boxes) == 5 and all(x.x1 <= frame.x1 for x in boxes)
  for one, other in itertools.combinations(boxes, 2):
    assert not one.overlaps(other)
  # In the order of their lines.
  assert [x.y0 for x in boxes] == sorted(x.y0 for x in boxes)


def test_a_name_with_room_is_beside_the_end_of_its_line(axes):
  ends = {"low": (1.0, 0.0), "high": (1.0, 1.0)}
  for x, y in ends.values():
    axes.plot([0.0, x], [0.5, y])
  panels.name_ends(axes, ends, dict.fromkeys(ends, "black"))
  for text, end in zip(axes.texts, ends.values(), strict=True):
    place = text.get_window_extent()
    middle = axes.transData.transform(end)[1]
    np.testing.assert_allclose((place.y0 + place.y1) / 2, middle, atol=3)
