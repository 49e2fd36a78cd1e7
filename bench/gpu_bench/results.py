"""What was measured, as one file of JSON with a part for each stage, so that stages can run on their own."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-bench"
RESULTS = "gpu-results.json"
CHECK = "check"
"""The part of the checks, whose rows are named by their column `check`."""


class Results:
    """The parts measured so far, kept in a file. Each says when, where and with what it was measured."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.parts: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, stage: str, part: Mapping[str, Any]) -> None:
        """Put a stage's part into the file, in place of an earlier one."""
        self.replace({**self.parts, stage: dict(part)})

    def replace(self, parts: Mapping[str, dict[str, Any]]) -> None:
        """Put these parts into the file, and nothing else."""
        self.parts = dict(parts)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(self.parts, indent=1, allow_nan=False) + "\n")
        fresh.replace(self._path)

    def value(self, stage: str, column: str, **where: object) -> float | None:
        """A number of the first row whose other columns are these; None when it was not measured."""
        for row in self.parts.get(stage, {}).get("rows", []):
            if all(row.get(name) == value for name, value in where.items()) and column in row:
                return float(row[column])
        return None


def merged(runs: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The parts of several runs, oldest first, as one.

    A later part replaces an earlier one, unless it alone failed. Checks of one commit on one device with the
    same versions add up, as they may be run in several pieces.
    """
    parts: dict[str, dict[str, Any]] = {}
    for run in runs:
        for stage, part in run.items():
            before = parts.get(stage)
            if stage == CHECK and before is not None:
                parts[stage] = with_checks(before, part)
            elif before is None or "error" in before or "error" not in part:
                parts[stage] = part
    return parts


def with_checks(before: Mapping[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """A part of checks with those of an earlier one that it does not have, if both prove the same thing."""
    if any(before.get(name) != part.get(name) for name in ("device", "versions", "commit")):
        return part
    rows = {row["check"]: row for row in before["rows"]}
    for row in part["rows"]:
        if row["outcome"] != "not run" or row["check"] not in rows:
            rows[row["check"]] = row
    return {**part, "rows": list(rows.values())}


def circumstances(device: str, commit: str | None) -> dict[str, str]:
    """Date, device, versions and commit of a measurement made now."""
    import torch  # noqa: PLC0415 - reading results needs none

    on_gpu = device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})"
    driver = _driver() if on_gpu else ""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{name}, driver {driver}" if driver else name,
        "versions": ", ".join(
            [
                f"Python {platform.python_version()}",
                f"torch {torch.__version__}",
                f"CUDA {torch.version.cuda}",
                *(f"{package} {version(package)}" for package in ("triton", "transformers")),
            ]
        ),
        "commit": commit or _commit(),
    }


def version(package: str) -> str:
    """A package's version, or that it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return found.stdout.splitlines()[0].strip()
    return ""


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return "unknown"
