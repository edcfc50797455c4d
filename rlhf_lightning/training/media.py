"""Tables of texts and pictures, to every logger that can take them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger


def taking_media(loggers: Iterable[Logger]) -> list[Logger]:
    """Those that take tables and pictures: TensorBoard's, MLflow's, and all with the methods of W&B's logger."""
    return [
        logger
        for logger in loggers
        if isinstance(logger, TensorBoardLogger | MLFlowLogger) or {"log_table", "log_image"} <= set(dir(logger))
    ]


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
) -> None:
    """A text `name` in TensorBoard, an artifact `name/step_N.md` in MLflow, else a table of the logger's own."""
    for logger in taking_media(loggers):
        experiment: Any = logger.experiment
        if isinstance(logger, TensorBoardLogger):
            experiment.add_text(name, _markdown(columns, rows), step)
        elif isinstance(logger, MLFlowLogger):
            experiment.log_text(logger.run_id, _markdown(columns, rows), f"{name}/step_{step:06d}.md")
        else:
            logger.log_table(key=name, columns=list(columns), data=[list(row) for row in rows], step=step)


def log_picture(loggers: Iterable[Logger], name: str, picture: np.ndarray, step: int) -> None:
    """A picture of an optimizer step, [height, width, 3] uint8."""
    for logger in taking_media(loggers):
        experiment: Any = logger.experiment
        if isinstance(logger, TensorBoardLogger):
            experiment.add_image(name, picture, step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            experiment.log_image(logger.run_id, picture, key=name, step=step)
        else:
            logger.log_image(key=name, images=[picture], step=step)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)])


def cell(text: str) -> str:
    """A text that stays within its cell of a Markdown table, and is text there, whatever it holds."""
    escaped = html.escape(text).replace("\\", "\\\\")
    for mark in "|*_`[]#~":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped.replace("\n", "<br>")
