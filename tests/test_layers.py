"""The direction of imports, and what importing the package may pull in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rlhf_lightning"

LAYERS = {
    "errors": 0,
    "other_names": 0,
    "arguments": 0,
    "batches": 0,
    "tiny": 0,
    "hub": 0,
    "gguf_files": 0,
    "terminal": 0,
    "user_code": 0,
    "files": 0,
    "functional": 0,
    "charts": 1,
    "metrics": 1,
    "data": 1,
    "models": 1,
    "rewards": 2,
    "rollouts": 3,
    "training": 4,
    "evaluation": 4,
    "planning": 5,
    "report": 5,
    "commands": 6,
    "cli": 7,
}
"""Rooms and their layers. A room imports from lower layers and from itself; of layer 0, nothing heavy at import."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts = [name.split(".") for name in names]
        rooms |= {part[1] for part in parts if part[0] == "rlhf_lightning" and len(part) > 1 and part[1] in LAYERS}
    return rooms


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_the_layers(path):
    room = room_of(path)
    assert room in LAYERS, f"{room} is a new room: give it a layer"
    wrong = {other for other in imported_rooms(path) if other != room and LAYERS[other] >= LAYERS[room] > 0}
    assert not wrong, f"{path.name} of {room} imports {sorted(wrong)}"
    if LAYERS[room] == 0:
        assert all(LAYERS[other] == 0 for other in imported_rooms(path))


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("rlhf_lightning", "torch lightning deepspeed datasets peft transformers"),
        ("rlhf_lightning.functional", "lightning torchmetrics deepspeed datasets peft transformers"),
        ("rlhf_lightning.cli", "torch lightning deepspeed datasets peft transformers"),
        ("rlhf_lightning.commands.fit", "deepspeed datasets peft bitsandbytes flash_attn vllm wandb"),
        ("rlhf_lightning.charts", "torch matplotlib"),
        ("rlhf_lightning.commands.pipeline.command", "torch lightning transformers"),
        ("rlhf_lightning.commands.doctor", "torch lightning transformers"),
        ("rlhf_lightning.commands.evaluate", "lightning deepspeed datasets peft"),
    ],
)
def test_importing_pulls_in_nothing_heavy(module, forbidden):
    script = f"import sys, {module}; print(*[m for m in {forbidden.split()} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_public_names_resolve():
    import rlhf_lightning

    for name in rlhf_lightning.__all__:
        assert getattr(rlhf_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = rlhf_lightning.Nonsense
