"""Learning curves out of the TensorBoard logs of a run."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.results import CurvePoint, RunCurves

log = logging.getLogger(__name__)

_FRAME = 16
"""Bytes around each record of a log: its length, and the checksums of both."""


def read_run(directory: str | Path) -> RunCurves:
    """Every scalar that a run logged, by its name, in the order of the steps; values that are not finite are skipped.

    `directory` is one version of a run (`runs/ppo/version_0`), or holds several, of which the newest is read; it
    keeps the name that was given. Of a step that was made twice, by a run that was resumed, the last one counts.
    Records after a damaged one are skipped, and the file is named. Raises `DataError` when there are no logs.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = Path(directory).expanduser()
    files = sorted(path.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise DataError(f"{directory}: no TensorBoard logs there; give a directory such as runs/ppo/version_0")
    home = files[-1].parent
    values: dict[str, dict[int, tuple[float, float]]] = {}
    for file in (file for file in files if file.parent == home):
        _name_damage(file)
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                known = values.setdefault(name, {})
                if math.isfinite(event.value) and event.wall_time >= known.get(event.step, (0.0, 0.0))[0]:
                    known[event.step] = (event.wall_time, event.value)
    curves = {name: [CurvePoint(step, of[step][1]) for step in sorted(of)] for name, of in sorted(values.items())}
    return RunCurves(str(directory), curves)


def _name_damage(file: Path) -> None:
    """Warn where a log ends for its readers, which stop silently at an incomplete record."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    whole = sum(len(record) + _FRAME for record in RawEventFileLoader(str(file)).Load())
    if whole < file.stat().st_size or whole == 0:
        log.warning("%s: damaged or incomplete; everything after byte %d is skipped", file, whole)
