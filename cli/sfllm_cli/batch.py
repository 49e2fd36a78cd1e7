"""`sfllm batch IN OUT`: answer a file of requests in OpenAI's batch format, and go on where it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from sfllm.config import options, parse
from sfllm_cli.batch_files import (
    BatchFileError,
    BatchRequest,
    check_requests,
    pending_requests,
    result,
)
from sfllm_cli.batch_output import BatchOutput
from sfllm_cli.batch_progress import BatchProgress, Tally
from sfllm_cli.batch_sending import BatchSender, Outcome
from sfllm_cli.client import choose_model, open_session
from sfllm_cli.settings import BatchSettings, known_settings

SYNC_SECONDS = 5.0
USAGE_EXIT_CODE = 2


def run(argv: Sequence[str]) -> int:
    """Answer the file; 0 all answered, 1 some failed, 2 unusable files, 130 interrupted.

    Raises `CommandError` when the server or the disk is gone; what was answered is kept.
    """
    settings = parse(
        BatchSettings,
        prog="sfllm batch IN OUT",
        description="Answer a file of requests in the format of OpenAI's batch API. "
        "Run again after an interruption, it goes on where it ended.",
        argv=positional_files(argv),
        known=known_settings(),
    )
    try:
        source, output, errors = _paths(settings)
        pending = check_requests(source)
        total = len(pending)
        opened = BatchOutput(output, errors, pending, retry_failed=settings.retry_failed)
    except BatchFileError as error:
        print(f"sfllm batch: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    with opened:
        tally = Tally(total, *opened.earlier, started=time.monotonic())
        batch = _Batch(settings, opened, tally)
        try:
            with contextlib.closing(pending_requests(source, pending)) as requests:
                stopped_by = asyncio.run(batch.run(requests)) if pending else None
        finally:
            print(tally.summary(time.monotonic(), errors), file=sys.stderr)
    if stopped_by is not None:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 128 + stopped_by
    return 1 if tally.failed or tally.failed_earlier else 0


def positional_files(argv: Sequence[str]) -> list[str]:
    """`IN OUT` among flags read as `--input IN --output OUT`."""
    takes_value = {"--config"} | {option.flag for option in options(BatchSettings) if option.type is not bool}
    names = iter(("--input", "--output"))
    found: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument in takes_value:
            found += [argument, *([value] if (value := next(arguments, None)) is not None else [])]
        elif not argument.startswith("-") and (name := next(names, None)) is not None:
            found += [name, argument]
        else:
            found.append(argument)
    return found


def _paths(settings: BatchSettings) -> tuple[Path, Path, Path]:
    """Input, output, errors. Raises `BatchFileError` when two are the same file."""
    source, output = Path(settings.input), Path(settings.output)
    errors = Path(settings.errors) if settings.errors else output.with_suffix(f".errors{output.suffix}")
    real = [Path(os.path.realpath(path)) for path in (source, output, errors)]
    if len(set(real)) < len(real):
        raise BatchFileError("input, output and errors must be different files")
    return source, output, errors


class _Batch:
    """One run over the requests that are left. The output belongs to the caller."""

    def __init__(self, settings: BatchSettings, output: BatchOutput, tally: Tally) -> None:
        self._settings = settings
        self._output = output
        self._tally = tally
        self._stopped_by: signal.Signals | None = None
        self._sync_due = tally.started + SYNC_SECONDS

    async def run(self, requests: Iterator[BatchRequest]) -> signal.Signals | None:
        """Send them; the signal that ended it early, if one did. Raises `CommandError`."""
        loop = asyncio.get_running_loop()
        sending = asyncio.create_task(self._send(requests))

        def stop(number: signal.Signals) -> None:
            self._stopped_by = number
            sending.cancel()

        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, stop, number)
        try:
            await asyncio.wait([sending])
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
        if not sending.cancelled():
            sending.result()
        return self._stopped_by

    async def _send(self, requests: Iterator[BatchRequest]) -> None:
        settings = self._settings
        async with open_session(settings, settings.timeout_seconds, settings.concurrency) as session:
            await choose_model(session, settings)  # tells a wrong address or key before anything is sent
            sender = BatchSender(
                session, settings.base_url, model=settings.model, max_retries=settings.max_retries
            )
            with BatchProgress(Console(stderr=True), self._tally) as progress:

                def take(request: BatchRequest, outcome: Outcome) -> None:
                    self._keep(request, outcome)
                    progress.show(time.monotonic())

                try:
                    await sender.send_all(requests, settings.concurrency, take)
                finally:
                    self._tally.retries = sender.retries

    def _keep(self, request: BatchRequest, outcome: Outcome) -> None:
        """Without a pause between file and tally: what is counted is kept, whenever a signal comes."""
        ended = result(request.custom_id, outcome)
        self._output.add(ended)
        self._tally.add(ended)
        now = time.monotonic()
        if now >= self._sync_due:
            self._sync_due = now + SYNC_SECONDS
            self._output.sync()
