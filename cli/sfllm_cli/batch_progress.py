"""What a batch tells while it runs and when it ends: how far it is, what it used, how fast it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sfllm_cli.batch_files import Result

LINE_SECONDS = 30.0
"""Where nobody watches, such as in a log, a line of progress comes this often."""


@dataclass
class Tally:
    """The counts of a batch; `started` and every `now` are seconds of one clock."""

    total: int
    answered_earlier: int
    failed_earlier: int
    started: float
    answered: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def ended(self) -> int:
        """How many requests of the file have a result by now."""
        return self.answered_earlier + self.failed_earlier + self.answered + self.failed

    def add(self, ended: Result) -> None:
        """Count a result and the tokens that it says it used."""
        if ended.failed or ended.response is None:
            self.failed += 1
            return
        self.answered += 1
        body = msgspec.json.decode(ended.response.body)
        usage = body.get("usage") if isinstance(body, dict) else None
        if isinstance(usage, dict):
            # The responses API has its own names for the two.
            self.prompt_tokens += _count(usage, "prompt_tokens", "input_tokens")
            self.output_tokens += _count(usage, "completion_tokens", "output_tokens")

    def progress(self, now: float) -> str:
        """One line on how it stands."""
        return f"{self.ended} of {self.total} ended, {self.failed} failed, {self._rate(now)}"

    def summary(self, now: float, errors: Path) -> str:
        """What to tell at the end."""
        text = (
            f"{self.total} requests: {self.answered + self.answered_earlier} answered "
            f"({self.answered_earlier} of them earlier), {self.failed + self.failed_earlier} failed, "
            f"{self.total - self.ended} left; {self.retries} sent again\n"
            f"{self.prompt_tokens} prompt tokens, {self.output_tokens} output tokens "
            f"in {now - self.started:.1f} s: {self._rate(now)}"
        )
        return f"{text}\nwhat failed is in {errors}" if self.failed + self.failed_earlier else text

    def _rate(self, now: float) -> str:
        seconds = max(now - self.started, 1e-3)
        ended = self.answered + self.failed
        return f"{ended / seconds:.1f} requests/s, {self.output_tokens / seconds:.0f} output tokens/s"


class BatchProgress:
    """A bar on a terminal, and a line now and then elsewhere."""

    def __init__(self, console: Console, tally: Tally) -> None:
        self._console = console
        self._tally = tally
        self._line_due = tally.started + LINE_SECONDS
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=tally.total, completed=tally.ended)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, now: float) -> None:
        """Show the tally, if it is time to."""
        if self._console.is_terminal:
            words = self._tally.progress(now).partition(", ")[2]
            self._bar.update(self._task, completed=self._tally.ended, description=words)
        elif now >= self._line_due:
            self._line_due = now + LINE_SECONDS
            self._console.print(self._tally.progress(now), highlight=False, markup=False, soft_wrap=True)


def _count(usage: Mapping[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := usage.get(name), int)), 0)
