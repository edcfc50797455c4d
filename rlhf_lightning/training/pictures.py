"""Pictures for TensorBoard, which draws a number against steps and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 440, 70, 20, 34, 46
_INK, _FAINT, _LINE = (40, 40, 40), (225, 225, 225), (31, 98, 172)


class Point(NamedTuple):
    """A rollout: its optimizer step, the root of its KL in nats per reply, and its mean reward."""

    step: int
    sqrt_kl: float
    reward: float


def reward_against_kl(points: Sequence[Point]) -> np.ndarray:
    """The path of a run, reward over sqrt(KL), as an image [H, W, 3] uint8; the axes of Gao et al. 2022 (2210.10760).

    Raises `ValueError` without points.
    """
    if not points:
        raise ValueError("a picture of no rollouts")
    from PIL import Image, ImageDraw  # comes with tensorboard

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    xs, ys = ticks(0.0, max(p.sqrt_kl for p in points)), ticks(*_span([p.reward for p in points]))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0])
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for x in xs:
        draw.line([place(x, ys[0]), place(x, ys[-1])], fill=_FAINT)
        draw.text((place(x, ys[0])[0], HEIGHT - BOTTOM + 6), f"{x:.6g}", fill=_INK, anchor="ma")
    for y in ys:
        draw.line([place(xs[0], y), place(xs[-1], y)], fill=_FAINT)
        draw.text((LEFT - 8, place(xs[0], y)[1]), f"{y:.6g}", fill=_INK, anchor="rm")
    path = [place(p.sqrt_kl, p.reward) for p in points]
    draw.line(path, fill=_LINE, width=2)
    for x, y in path:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_LINE)
    draw.text((path[-1][0], path[-1][1] - 8), f"step {points[-1].step}", fill=_INK, anchor="rb")
    draw.text((LEFT, 10), "mean reward of a rollout", fill=_INK)
    draw.text(
        (WIDTH - RIGHT, HEIGHT - 8), "square root of the KL from the reference, nats a reply", fill=_INK, anchor="rb"
    )
    return np.asarray(image)


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that enclose `low` and `high`; a span of 0 is widened."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    return [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
