"""How is a distribution of timesteps drawn? Steps over 0 to 1000, one colour for each of several settings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, PLOT_HEIGHT = 960, 420
LEFT, RIGHT, TOP, AXIS = 70, 24, 24, 44
LINE, LEGEND_COLUMNS = 22, 110
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
INK, GRID = "#333333", "#dddddd"


@dataclass(frozen=True)
class Curve:
    """The distribution of one choice of settings."""

    name: str
    shares: tuple[float, ...]
    """Of the draws in each bin, from timestep 0 to 1000; they add up to 1."""
    weighted: tuple[float, ...] | None
    """Of the loss in each bin, where that is another one."""
    mean: float
    quantiles: Mapping[float, float]


def draw_chart(curves: Sequence[Curve]) -> Image.Image:
    """Every curve as a line of steps, its share of the loss dashed, with a legend below."""
    font = ImageFont.load_default(15)
    legend = [textwrap.wrap(curve.name, LEGEND_COLUMNS) for curve in curves]
    height = TOP + PLOT_HEIGHT + AXIS + LINE * sum(map(len, legend)) + LINE * any(c.weighted for c in curves) + TOP
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    top = round_up(max(share for curve in curves for share in (*curve.shares, *(curve.weighted or ()))))
    draw_axes(draw, font, top)
    for index, curve in enumerate(curves):
        colour = COLOURS[index % len(COLOURS)]
        draw.line(steps(curve.shares, top), fill=colour, width=3, joint="curve")
        if curve.weighted is not None:
            dashed(draw, steps(curve.weighted, top), colour)
    y = TOP + PLOT_HEIGHT + AXIS
    for index, lines in enumerate(legend):
        draw.line([(LEFT, y + LINE // 2), (LEFT + 28, y + LINE // 2)], fill=COLOURS[index % len(COLOURS)], width=4)
        for line in lines:
            draw.text((LEFT + 38, y), line, fill=INK, font=font)
            y += LINE
    if any(curve.weighted for curve in curves):
        draw.text((LEFT + 38, y), "dashed: share of the loss", fill=INK, font=font)
    return image


def draw_axes(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, top: float) -> None:
    """Timesteps to the right, percents of the draws upwards."""
    for tick in range(0, 1001, 100):
        x, _ = place(tick / 1000, 0, top)
        draw.line([(x, TOP), (x, TOP + PLOT_HEIGHT)], fill=GRID)
        draw.text((x, TOP + PLOT_HEIGHT + 6), str(tick), fill=INK, font=font, anchor="mt")
    for part in range(5):
        share = top * part / 4
        _, y = place(0, share, top)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GRID)
        draw.text((LEFT - 8, y), f"{100 * share:.3g} %", fill=INK, font=font, anchor="rm")
    note = "timestep: 0 is the image, 1000 is noise"
    draw.text((WIDTH // 2, TOP + PLOT_HEIGHT + 24), note, fill=INK, font=font, anchor="mt")


def steps(shares: Sequence[float], top: float) -> list[tuple[float, float]]:
    """The corners of a line of steps over the bins."""
    corners = []
    for index, share in enumerate(shares):
        corners += [place(index / len(shares), share, top), place((index + 1) / len(shares), share, top)]
    return corners


def dashed(draw: ImageDraw.ImageDraw, corners: Sequence[tuple[float, float]], colour: str, dash: int = 7) -> None:
    """A line through `corners` of horizontal and vertical pieces, in dashes."""
    for (x, y), (to_x, to_y) in zip(corners, corners[1:], strict=False):
        length = abs(to_x - x) + abs(to_y - y)
        for start in range(0, int(length), 2 * dash):
            first, last = start / length, min(start + dash, length) / length
            draw.line(
                [(x + first * (to_x - x), y + first * (to_y - y)), (x + last * (to_x - x), y + last * (to_y - y))],
                fill=colour,
                width=2,
            )


def place(x: float, share: float, top: float) -> tuple[float, float]:
    """The pixel of a part `x` of the timesteps and a `share` of at most `top`."""
    return LEFT + x * (WIDTH - LEFT - RIGHT), TOP + PLOT_HEIGHT * (1 - share / top)


def round_up(share: float) -> float:
    """The end of the axis: the next of 4, 8, 12, 20, 40, 60, 80 and 100 %."""
    return next((end for end in (0.04, 0.08, 0.12, 0.2, 0.4, 0.6, 0.8) if share <= end), 1.0)
