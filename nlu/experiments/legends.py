"""Legends that lie wholly inside their figure, whatever the number and the length of the labels."""

import math
import textwrap
from collections.abc import Mapping

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend

MOST_COLUMNS = 4
WRAP = 60  # characters: a longer label goes on in another line
MARGIN = 0.15  # inches on each side: text is a little wider at some resolutions than at that it is measured at


def add_legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """One legend below all panels; it gets as many columns as fit, and the figure grows by what it needs.

    The panels keep their size: a legend laid out inside a figure of fixed height takes its room from them.
    """
    if not handles:
        return
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(min(MOST_COLUMNS, len(handles)), 0, -1):
        legend = _legend(figure, handles, columns)
        extent = legend.get_window_extent(renderer)
        # In whole tenths of an inch, so that a hair's breadth in a font does not change the picture's size.
        width, height = (math.ceil(10 * pixels / figure.dpi) / 10 for pixels in (extent.width, extent.height))
        if width + 2 * MARGIN <= figure.get_figwidth() or columns == 1:
            break
        legend.remove()
    figure.set_size_inches(max(width + 2 * MARGIN, figure.get_figwidth()), figure.get_figheight() + height)


def labelled_lines(panels: list[Axes]) -> dict[str, Artist]:
    """The first line of each label. `get_legend_handles_labels` would leave out labels that begin with `_`."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        for line in axes.get_lines():
            handles.setdefault(line.get_label(), line)
    return handles


def _legend(figure: Figure, handles: Mapping[str, Artist], columns: int) -> Legend:
    # Labels are put in afterwards: given to the constructor, those that begin with `_` drop out in some versions.
    legend = figure.legend(list(handles.values()), ["label"] * len(handles), loc="outside lower center", ncols=columns)
    for text, label in zip(legend.get_texts(), handles, strict=True):
        text.set_parse_math(False)  # a `$` is a character of the label
        text.set_text("\n".join(textwrap.wrap(label, WRAP)))
    return legend
