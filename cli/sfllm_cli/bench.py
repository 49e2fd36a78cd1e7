"""`sfllm bench`: a closed loop of streaming requests against a server, and its latencies and rates."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sfllm.config import parse
from sfllm_cli.bench_load import Shape, body, parse_span, shapes
from sfllm_cli.bench_report import Report, Sample, Summary, report
from sfllm_cli.client import ServerError, choose_model, open_session, stream_events
from sfllm_cli.errors import CommandError
from sfllm_cli.settings import BenchSettings, known_settings

LAG_INTERVAL_SECONDS = 0.02
LAG_WARNING_SECONDS = 0.01
REQUEST_ERRORS = (ServerError, aiohttp.ClientError, TimeoutError, OSError, ValueError)


class Outcome(NamedTuple):
    """A finished benchmark. `lag` says how late this program's own event loop was, in seconds."""

    model: str
    prompts: str
    report: Report
    lag: Summary


def run(argv: Sequence[str]) -> int:
    """Run the benchmark and print it; 1 when a request failed. Raises `CommandError`."""
    settings = parse(
        BenchSettings,
        prog="sfllm bench",
        description="Measure a server: a fixed number of requests stays open until all have been answered.",
        argv=argv,
        known=known_settings(),
    )
    for text in (settings.prompt_tokens, settings.output_tokens):
        try:
            parse_span(text)
        except ValueError as error:
            raise CommandError(str(error)) from error
    # Standard output belongs to the JSON document when that goes there.
    console = Console(stderr=settings.json == "-")
    outcome = asyncio.run(benchmark(settings, Console(stderr=True)))
    _print(console, settings, outcome)
    if settings.json is not None:
        _write_json(settings, outcome)
    return 1 if outcome.report.failed else 0


async def benchmark(settings: BenchSettings, console: Console) -> Outcome:
    """Warm up, then send all requests. Raises `CommandError` when the server cannot be used at all."""
    async with open_session(settings, settings.timeout_seconds, settings.concurrency + 1) as session:
        model = await choose_model(session, settings)
        token_ids = await _takes_token_ids(session, settings, model)
        sender = _Sender(session, settings, model, token_ids)
        for shape in shapes(settings, settings.warmup):
            await sender.send(shape)
        lags: list[float] = []
        with _progress(console, settings.requests) as advance:
            async with _lag_recorded(lags):
                samples = await _closed_loop(sender, settings, advance)
    return Outcome(model, "token ids" if token_ids else "words", report(samples), Summary.of(lags))


async def _takes_token_ids(session: aiohttp.ClientSession, settings: BenchSettings, model: str) -> bool:
    """Whether prompts can be token ids, so that their length is exact. Raises `CommandError`."""
    if settings.endpoint == "chat":
        return False
    sender = _Sender(session, settings, model, token_ids=True)
    sample = await sender.send(Shape(4, 1, 0))
    if not sample.error:
        return True
    words = await _Sender(session, settings, model, token_ids=False).send(Shape(4, 1, 0))
    if words.error:
        raise CommandError(f"{settings.base_url} refuses even a small request: {words.error}")
    return False


class _Sender:
    """Sends one request at a time and takes its times."""

    def __init__(
        self, session: aiohttp.ClientSession, settings: BenchSettings, model: str, token_ids: bool
    ) -> None:
        self._session = session
        self._settings = settings
        self._model = model
        self._token_ids = token_ids
        path = "/v1/chat/completions" if settings.endpoint == "chat" else "/v1/completions"
        self._url = settings.base_url + path

    async def send(self, shape: Shape) -> Sample:
        """The sample of a request of that shape, whatever became of it."""
        request = body(self._settings, self._model, shape, token_ids=self._token_ids)
        arrivals: list[float] = []
        usage: dict[str, Any] = {}
        error = ""
        sent_at = time.perf_counter()
        try:
            async for event in stream_events(self._session, self._url, request):
                if _has_output(event):
                    arrivals.append(time.perf_counter())
                usage = event.get("usage") or usage
        except REQUEST_ERRORS as problem:
            error = str(problem) or type(problem).__name__
        return Sample(
            sent_at=sent_at,
            ended_at=time.perf_counter(),
            arrivals=tuple(arrivals),
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            output_tokens=int(usage.get("completion_tokens", len(arrivals))),
            error=error,
        )


def _has_output(event: dict[str, Any]) -> bool:
    """Whether the event carries text of the answer; a first chunk with only the role does not."""
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or choices[0]
    return bool(delta.get("text") or delta.get("content") or delta.get("reasoning_content"))


async def _closed_loop(sender: _Sender, settings: BenchSettings, advance: Callable[[], None]) -> list[Sample]:
    """Keep `concurrency` requests open until all are done."""
    waiting = shapes(settings, settings.requests)
    samples: list[Sample] = []

    async def client() -> None:
        for shape in waiting:
            samples.append(await sender.send(shape))
            advance()

    async with asyncio.TaskGroup() as clients:
        for _ in range(min(settings.concurrency, settings.requests)):
            clients.create_task(client())
    return samples


@contextlib.asynccontextmanager
async def _lag_recorded(lags: list[float]) -> AsyncIterator[None]:
    """Record how late timers of this event loop are: by as much, arrivals are seen too late."""

    async def record() -> None:
        while True:
            due = time.perf_counter() + LAG_INTERVAL_SECONDS
            await asyncio.sleep(LAG_INTERVAL_SECONDS)
            lags.append(max(0.0, time.perf_counter() - due))

    task = asyncio.create_task(record())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda: progress.advance(task)


def _print(console: Console, settings: BenchSettings, outcome: Outcome) -> None:
    figures = outcome.report
    console.print(
        f"{outcome.model} at {settings.base_url}: {figures.completed} of {settings.requests} requests, "
        f"{settings.concurrency} at once, in {figures.seconds:.2f} s (prompts of {outcome.prompts})",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("milliseconds", *(("mean", "p50", "p95", "p99")), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, summary in (
        ("time to first token (TTFT)", figures.ttft),
        ("between arrivals (ITL)", figures.itl),
        ("per output token (TPOT)", figures.tpot),
        ("end to end", figures.end_to_end),
    ):
        values = (summary.mean, summary.p50, summary.p95, summary.p99)
        table.add_row(name, *(f"{value * 1000:.2f}" for value in values))
    console.print(table)
    console.print(
        f"{figures.requests_per_second:.2f} requests/s, "
        f"{figures.output_tokens_per_second:.1f} output tokens/s, "
        f"{figures.total_tokens_per_second:.1f} total tokens/s "
        f"({figures.prompt_tokens} prompt, {figures.output_tokens} output)",
        highlight=False,
        soft_wrap=True,
    )
    for error, count in figures.errors.items():
        console.print(f"{count} failed: {error}", style="red", highlight=False, markup=False)
    if outcome.lag.p95 > LAG_WARNING_SECONDS:
        console.print(
            f"This client was short of CPU: its event loop ran {outcome.lag.p95 * 1000:.1f} ms late (p95), "
            "which is in the latencies. Run it on another machine, or with a lower --concurrency.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def _write_json(settings: BenchSettings, outcome: Outcome) -> None:
    document = {
        "model": outcome.model,
        "prompts": outcome.prompts,
        "settings": {
            name: value for name, value in msgspec.structs.asdict(settings).items() if name != "api_key"
        },
        "results": outcome.report.to_json(),
        "client_lag_seconds": outcome.lag.to_json(),
    }
    text = json.dumps(document, indent=2)
    if settings.json == "-":
        sys.stdout.write(text + "\n")
        return
    assert settings.json is not None
    try:
        Path(settings.json).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(
            f"cannot write {settings.json}: {error.strerror}; choose another --json FILE"
        ) from error
