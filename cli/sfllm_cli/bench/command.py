"""The command: settings read and checked, servers found, rounds run, results printed and written."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sfllm.config import parse
from sfllm_cli.bench.cpu import server_roots
from sfllm_cli.bench.documents import need_plots, write
from sfllm_cli.bench.rounds import AfterRound, Leg, Server, all_go_on, all_rounds, results, warm_up
from sfllm_cli.bench.sending import Sender
from sfllm_cli.bench.tables import show
from sfllm_cli.bench.trace import Entry, TraceError, chat_trace, parse_trace
from sfllm_cli.bench.workload import Shape, bodies, extra_body, parse_span, points, shapes
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.client import choose_model, open_session
from sfllm_cli.errors import CommandError
from sfllm_cli.settings import ClientSettings, known_settings

MAX_TRACE_BYTES = 256 * 2**20
MAX_CONNECTIONS = 20_000


class Target(NamedTuple):
    """A server to measure: its address, the settings of its requests, its processes where known."""

    client: ClientSettings
    settings: BenchSettings
    roots: frozenset[int]


def run(argv: Sequence[str]) -> int:
    """Run the benchmark, print and write its results; 1 when a request failed. Raises `CommandError`."""
    settings = parse(
        BenchSettings,
        prog="sfllm bench",
        description="Measure a server, or compare several: latency and throughput under load.",
        argv=together("--url", argv),
        known=known_settings(),
    )
    targets, trace = check(settings), read_trace(settings)
    # Standard output belongs to the JSON document when that goes there.
    console = Console(stderr=settings.json == "-")
    servers, legs = asyncio.run(benchmark(settings, targets, trace, Console(stderr=True)))
    medians = results(legs)
    show(console, settings, servers, medians)
    write(settings, servers, medians, legs)
    return 1 if any(leg.figures.failed for leg in legs if leg.kept) else 0


def together(flag: str, argv: Sequence[str]) -> list[str]:
    """`--url A --url B` read as `--url A,B`."""
    values: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument.startswith(f"{flag}="):
            values.append(argument.partition("=")[2])
        elif argument == flag and (value := next(arguments, None)) is not None:
            values.append(value)
        else:
            rest.append(argument)
    return [*rest, flag, ",".join(values)] if values else rest


def check(settings: BenchSettings) -> dict[str, Target]:
    """The servers by name. Raises `CommandError` for settings that cannot be used, before any work."""
    try:
        parse_span(settings.prompt_tokens)
        parse_span(settings.output_tokens)
        extra_body(settings.extra_body)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if settings.html is not None or settings.png is not None:
        need_plots()
    named: dict[str, Target] = {}
    for text in settings.url or (f"http://127.0.0.1:{settings.port}",):
        name, equals, url = text.partition("=")
        if not equals or "/" in name:  # a plain address, which may have a query
            name, url = (text if len(settings.url) > 1 else "server"), text
        if name in named:
            raise CommandError(f"--url names {name!r} twice")
        client = ClientSettings(url=url, model=settings.model, api_key=settings.api_key)
        named[name] = Target(client, settings, server_roots(client.base_url))
    return named


def read_trace(settings: BenchSettings) -> list[Entry] | None:
    """The trace to replay, if any. Raises `CommandError`."""
    if settings.trace is None:
        return None
    if settings.trace == "chat":
        return chat_trace(settings.requests, random.Random(settings.seed))
    file = Path(settings.trace)
    try:
        if file.stat().st_size > MAX_TRACE_BYTES:
            raise CommandError(f"{file} is larger than {MAX_TRACE_BYTES} bytes; cut out a part of it")
        return parse_trace(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}; --trace takes a file or 'chat'") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{file} is no text file: {error}") from error
    except TraceError as error:
        raise CommandError(f"{file}: {error}") from error


async def benchmark(
    settings: BenchSettings,
    targets: Mapping[str, Target],
    trace: Sequence[Entry] | None,
    console: Console,
    after_round: AfterRound = all_go_on,
) -> tuple[list[Server], list[Leg]]:
    """Find and warm up the servers, then run all rounds. Raises `CommandError` when one cannot be used."""
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for name, target in targets.items():
            session = await stack.enter_async_context(
                open_session(target.client, settings.timeout_seconds, MAX_CONNECTIONS)
            )
            server = await _server(name, target, session)
            await warm_up(server, trace)
            servers.append(server)
        load = points(settings)
        size = len(shapes(settings, load[0], settings.requests, trace))
        with _progress(console, size * settings.rounds * len(servers) * len(load)) as progress:
            legs = await all_rounds(
                settings,
                servers,
                load,
                trace,
                lambda: progress.advance(progress.task_ids[0]),
                lambda text: progress.console.print(text, highlight=False, markup=False),
                after_round,
            )
        return servers, legs


async def _server(name: str, target: Target, session: aiohttp.ClientSession) -> Server:
    """The server, and whether its prompts can be token ids, whose number is exact."""
    client, settings = target.client, target.settings
    model = await choose_model(session, client)
    path = "/v1/chat/completions" if settings.endpoint == "chat" else "/v1/completions"
    sender = Sender(session, client.base_url + path, fresh_connections=settings.fresh_connections)
    error = ""
    for token_ids in (True, False) if settings.endpoint == "completions" else (False,):
        tiny = bodies(settings, model, [Shape(0.0, 4, 1, 0)], token_ids=token_ids, salt="try")
        error = (await sender.send(tiny[0])).error
        if not error:
            return Server(name, client.base_url, model, token_ids, sender, settings, target.roots)
    raise CommandError(f"{client.base_url} refuses even a small request: {error}")


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Progress]:
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("requests", total=total)
        yield progress
