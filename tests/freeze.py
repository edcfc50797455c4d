"""What a change of structure must not change: the quickstart's numbers and weights, and every configuration.

    python -m tests.freeze record FILE     # before the change
    python -m tests.freeze compare FILE    # after it; prints what differs, and exits with 1 if anything does

Weights are compared by SHA-256, so both are to be run on one machine with one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import yaml

from tests.programs import run
from tests.test_configs import CONFIGS, LLAMA, QUICKSTART, ROOT

RUNS = ("sft", "reward_model", "ppo", "dpo")


def frozen(directory: Path) -> dict[str, object]:
    """Run the quickstart and its DPO in an empty directory, print every configuration, and return what came out.

    Times, paths and versions are left out. Raises RuntimeError where a command fails.
    """
    _succeed(directory, "pipeline", "--config", str(ROOT / "configs" / "quickstart.yaml"))
    _succeed(directory, "fit", "--config", str(ROOT / "configs" / "quickstart" / "dpo.yaml"))
    found: dict[str, object] = {}
    for name in RUNS:
        weights = directory / "models" / f"quickstart_{name}" / "model.safetensors"
        found[f"weights/{name}"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    results = json.loads((directory / "reports" / "quickstart" / "metrics.json").read_text())
    found |= {f"metrics/{name}": value for name, value in results["metrics"].items()}
    runs = [[path] for path in (*CONFIGS, *QUICKSTART) if "trainer" in yaml.safe_load(path.read_text())]
    for paths in [*runs, *([ROOT / "configs" / "dpo.yaml", overlay] for overlay in LLAMA)]:
        arguments = [part for path in paths for part in ("--config", str(path))]
        found[f"config/{paths[-1].relative_to(ROOT)}"] = yaml.safe_load(
            _succeed(directory, "fit", *arguments, "--print_config")
        )
    return found


def _succeed(directory: Path, *arguments: str) -> str:
    done = run(directory, *arguments)
    if done.code:
        raise RuntimeError(f"{' '.join(arguments)}: {done.code}\n{done.error[-3000:]}")
    return done.out


def main(command: str, file: str) -> int:
    """Record into a JSON file or compare with it; returns 1 where something differs."""
    with tempfile.TemporaryDirectory(prefix="freeze-") as directory:
        os.environ["XDG_CACHE_HOME"] = f"{directory}/cache"
        found = json.loads(json.dumps(frozen(Path(directory))))
    if command == "record":
        Path(file).write_text(json.dumps(found, indent=1, sort_keys=True))
        return 0
    before = json.loads(Path(file).read_text())
    different = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    for name in different:
        print(f"{name}\n  before: {before.get(name)}\n  now:    {found.get(name)}")
    print(f"{len(before.keys() | found.keys())} compared, {len(different)} differ")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
