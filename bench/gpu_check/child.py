"""Runs checks in this process, one after the other, until one leaves it unfit for others.

An illegal access or a failed assertion on a GPU spoils every later call of the process that caused it, and a
kernel that never ends cannot be interrupted. So the process ends after either, and another one goes on.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import runpy
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.gpu_check import ROOT
from bench.gpu_check.journal import FAILED, OK, SKIPPED, Journal, Outcome

if TYPE_CHECKING:
    from bench.gpu_check.checks import Check, Setting

UNFIT = 77
"""Exit code that asks for another process to go on."""


def run_here(journal: Journal, device: str, areas: Sequence[str], only: Sequence[str]) -> int:
    """Run all checks of these areas that the journal does not have as begun; 0 or UNFIT."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        runpy.run_path(str(ROOT / "tests/kernels/conftest.py"))  # mends the interpreter

    import torch  # noqa: PLC0415 - after the choice of the interpreter
    from bench.gpu_check.checks import Setting  # noqa: PLC0415 - brings torch in

    torch.set_float32_matmul_precision("highest")  # no TF32
    setting = Setting.of(device)
    checks = [
        check
        for area in areas
        for check in _checks(area, setting, journal)
        if not only or any(part in check.title for part in only)
    ]
    return run_checks(journal, checks, setting.on_gpu)


def run_checks(journal: Journal, checks: Sequence[Check], on_gpu: bool) -> int:
    """Run those that the journal does not have as begun; 0, or UNFIT where the others need a new process."""
    journal.plan(check.title for check in checks)
    for check in checks:
        if check.title in journal.begun:
            continue
        journal.begin(check.title)
        started = time.monotonic()
        faulthandler.dump_traceback_later(check.seconds, exit=True)
        outcome, fit = outcome_of(check, on_gpu)
        faulthandler.cancel_dump_traceback_later()
        tell(outcome, time.monotonic() - started)
        journal.end(outcome)
        if not fit:
            return UNFIT
    return 0


def _checks(area: str, setting: Setting, journal: Journal) -> list[Check]:
    """An area's checks. That they cannot be listed is a failure of its own, and other areas go on."""
    try:
        checks: list[Check] = importlib.import_module(f"bench.gpu_check.{area}").checks(setting)
    except Exception as error:  # noqa: BLE001 - whatever went wrong is what is to be told
        title = f"{area}: listing its checks"
        if title not in journal.begun:
            journal.begin(title)
            outcome = Outcome(FAILED, title, _told(error))
            tell(outcome, 0.0)
            journal.end(outcome)
        return []
    return checks


def outcome_of(check: Check, on_gpu: bool) -> tuple[Outcome, bool]:
    """Run one check, whatever comes of it; and whether the process is fit for others."""
    if check.needs_gpu and not on_gpu:
        return Outcome(SKIPPED, check.title, "needs a GPU"), True
    try:
        return Outcome(OK, check.title, check.run()), True
    except Exception as error:  # noqa: BLE001 - whatever went wrong is this check's result, and others follow
        return Outcome(FAILED, check.title, _told(error)), not on_gpu or _device_is_sound()


def _told(error: Exception) -> str:
    place = "" if isinstance(error, AssertionError) else "\n" + traceback.format_exc(limit=-3)
    return f"{type(error).__name__}: {error}{place}"


def _device_is_sound() -> bool:
    """Whether the GPU still takes work from this process."""
    import torch  # noqa: PLC0415 - as in `run_here`

    try:
        torch.cuda.synchronize()
        return float(torch.ones(8, device="cuda").sum()) == 8.0
    except RuntimeError as error:
        print(f"the device is of no more use to this process: {error}", file=sys.stderr)
        return False


def tell(outcome: Outcome, seconds: float) -> None:
    """Print how a check went, in one line."""
    first = outcome.text.partition("\n")[0][:200]
    print(f"{outcome.state:7} {outcome.title}: {first} ({seconds:.1f} s)", flush=True)
