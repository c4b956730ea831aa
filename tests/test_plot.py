"""Pictures: lines that can be told apart, legends that hide nothing, numbers as one writes them."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from jrl.run import plot

GROUPS = np.array([2, 4, 8])
LINES = [(f"method {i}", GROUPS, np.array([[20.0, 7.0, 3.0]])) for i in range(6)]  # each lies on the one before
PANELS = [plot.Panel("on-policy", "group size", "variance", LINES, "xy")]


@pytest.fixture
def axes(tmp_path, monkeypatch):
    """The axes of a picture that was drawn."""
    monkeypatch.setattr(plt.Figure, "savefig", lambda *args, **kwargs: None)
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot.draw(tmp_path / "picture.png", PANELS)
    figure = plt.gcf()
    figure.canvas.draw()
    yield figure.axes[0]
    monkeypatch.undo()
    plt.close(figure)


def test_lines_are_told_apart_without_colour_and_none_hides_another(axes):
    drawn = [line for line in axes.get_lines() if line.get_label().startswith("method")]
    assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == 6
    widths = [line.get_linewidth() for line in drawn]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]


def test_the_legend_of_several_lines_stands_beside_them(axes):
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


def test_numbers_on_a_logarithmic_axis_are_plain_and_those_of_the_data(axes):
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4", "8"]
    assert {"5", "10", "20"} <= {label.get_text() for label in axes.get_yticklabels()}


def test_a_picture_is_drawn_before_its_vector_graphic(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **kwargs: drawn.append(path.suffix))
    for name in "abcdefgh":  # a layout depends on what was drawn before
        plot.draw(tmp_path / f"{name}.png", PANELS)
    assert drawn == [".png", ".svg"] * 8


def test_a_picture_has_a_vector_graphic_beside_it_and_both_are_the_same_each_time(tmp_path):
    x = np.arange(0, 200_000, 1000.0)
    panels = [plot.Panel("PPO", "steps", "return", [("", x, np.sqrt(x)[None] * np.array([[1.0], [2.0]]))])]
    for name in "abcdef":
        plot.draw(tmp_path / f"{name}.png", panels)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{x}.{y}" for x in "abcdef" for y in ("png", "svg")]
    for suffix in ("png", "svg"):
        assert len({path.read_bytes() for path in tmp_path.glob(f"*.{suffix}")}) == 1
    plot.draw(tmp_path / "g.pdf", panels)
    assert (tmp_path / "g.pdf").read_bytes()[:4] == b"%PDF" and not (tmp_path / "g.svg").exists()
