"""`sfllm serve`: one model on this machine, as gateway, scheduler and worker processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec

from sfllm import logs
from sfllm.config import parse
from sfllm.link_keys import CLIENT_ROLES, key_file, read_client_keys, read_scheduler_keys
from sfllm.model_files import resolve_model
from sfllm_cli.errors import CommandError
from sfllm_cli.gpus import find_gpus
from sfllm_cli.ports import check_free, free_port
from sfllm_cli.restarts import RestartPolicy
from sfllm_cli.serve_plan import admin_ports, child_specs, local_url
from sfllm_cli.settings import AllServeSettings, ServicesSettings, known_settings, positional_model, split
from sfllm_cli.supervisor import Problem, Supervisor

PROBE_SECONDS = 2.0
GRACE_BEYOND_DRAIN_SECONDS = 5.0
LONGEST_SOCKET_PATH = 80
"""A socket file's whole path may have 107 characters; this leaves room for its name."""


def run(argv: Sequence[str]) -> int:
    """Serve until a signal; 0 after a clean stop.

    Raises `CommandError`, `ModelFilesError` or `LinkKeysError`.
    """
    started = time.monotonic()
    settings = split(
        parse(
            AllServeSettings,
            prog="sfllm serve",
            description="Serve a model: starts, watches and stops scheduler, workers and gateways.",
            argv=positional_model(argv),
            known=known_settings(),
        )
    )
    logs.setup("supervisor", settings.serve.log_level, settings.serve.log_format)
    if settings.serve.link_keys:
        _check_link_keys(Path(settings.serve.link_keys))
    gpus = _gpus(settings)
    settings = _with_port(settings, gpus)
    if settings.worker.load_format != "dummy" and not settings.worker.mock:
        resolve_model(settings.serve.model)
    with tempfile.TemporaryDirectory(prefix="sfllm-", dir=_short_directory()) as sockets:
        try:
            return asyncio.run(_serve(settings, Path(sockets), gpus, started))
        except OSError as error:
            raise CommandError(f"cannot run the services: {error}") from error


async def _serve(settings: ServicesSettings, sockets: Path, gpus: Sequence[str], started: float) -> int:
    gateway = settings.gateway
    url = local_url(gateway.host, gateway.port, "http" if gateway.tls_cert_file is None else "https")
    # Of TLS nothing is checked here: the certificate is for the name that clients use, not for this machine.
    connector = aiohttp.TCPConnector(ssl=False)
    specs = child_specs(settings, sockets, os.environ, _cores(), gpus)
    for spec, port in zip(specs, admin_ports(settings.serve, gpus), strict=False):
        print(f"{spec.name}: http://{settings.serve.admin_host}:{port}/metrics", flush=True)
    prefix = settings.serve.log_format == "text"
    timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def announce() -> None:
            model = await _first_model(session, url, gateway.api_key)
            key_needed = bool(gateway.api_key or gateway.api_key_file)
            _announce(url, model, time.monotonic() - started, key_needed)

        supervisor = Supervisor(
            specs,
            policy=RestartPolicy(crash_limit=settings.serve.max_restarts),
            probe=lambda: _probe(session, url),
            on_ready=announce,
            write=lambda name, line: _write(name if prefix else "", line),
            grace_seconds=_grace_seconds(settings),
        )
        code = await supervisor.run()
    print("stopped" if code == 0 else "stopped after a failure", flush=True)
    return code


async def _probe(session: aiohttp.ClientSession, url: str) -> Problem:
    """Why the stack cannot serve, or None when it can."""
    try:
        async with session.get(f"{url}/ready") as response:
            return None if response.status == 200 else (await response.text())[:500]
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"the gateway does not answer: {error or type(error).__name__}"


async def _first_model(session: aiohttp.ClientSession, url: str, keys: Sequence[str]) -> str | None:
    """The id of the served model, as clients name it. None if it takes a key that only clients have."""
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        async with session.get(f"{url}/v1/models", headers=headers) as response:
            if response.status == 401:
                return None
            models = await response.json()
            return str(models["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
        raise CommandError(f"{url}/v1/models does not list the model: {error!r}") from error


def _announce(url: str, model: str | None, seconds: float, key_needed: bool) -> None:
    question = {"role": "user", "content": "Why is the sky blue?"}
    named = {} if model is None else {"model": model}
    body = json.dumps({**named, "max_tokens": 64, "messages": [question]})
    headers = "-H 'Content-Type: application/json'"
    if key_needed:
        headers += ' -H "Authorization: Bearer $SFLLM_API_KEY"'
    curl = f"curl {url}/v1/chat/completions {headers} -d {shlex.quote(body)}"
    print(
        f"\nsfllm serves {model or 'its model'} at {url} (ready after {seconds:.1f} s; Ctrl-C stops it)\n"
        f"\nTry it:\n  {curl}\nor talk to it in another terminal:\n  {_command()} chat --url {url}\n",
        flush=True,
    )


def _command() -> str:
    """How this user starts `sfllm`, which need not be on the search path."""
    if shutil.which("sfllm"):
        return "sfllm"
    return sys.argv[0] if Path(sys.argv[0]).name == "sfllm" else f"{sys.executable} -m sfllm_cli"


def _with_port(settings: ServicesSettings, gpus: Sequence[str]) -> ServicesSettings:
    """Settings with a real port; a port that is taken is told before anything starts."""
    gateway = settings.gateway
    if gateway.port == 0:
        gateway = msgspec.structs.replace(gateway, port=free_port(gateway.host))
    else:
        check_free(gateway.host, gateway.port, "--port")
    for port in admin_ports(settings.serve, gpus):
        check_free(settings.serve.admin_host, port, "--admin-port")
    return settings._replace(gateway=gateway)


def _check_link_keys(folder: Path) -> None:
    """Tell before anything starts what a service would refuse. Raises `LinkKeysError`."""
    read_scheduler_keys(key_file(folder, "scheduler"))
    for role in CLIENT_ROLES:
        read_client_keys(key_file(folder, role), role)


def _gpus(settings: ServicesSettings) -> tuple[str, ...]:
    """The GPUs to share among workers; a worker that is alone finds its own."""
    worker = settings.worker
    if settings.serve.workers == 1 or worker.mock or worker.device == "cpu":
        return ()
    return find_gpus(os.environ)


def _short_directory() -> str | None:
    """Where the sockets' directory is made: the usual place, unless its path is too long for sockets."""
    return "/tmp" if len(tempfile.gettempdir()) > LONGEST_SOCKET_PATH else None  # noqa: S108 - mode 700 inside


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _grace_seconds(settings: ServicesSettings) -> float:
    """How long a stop may take: gateways drain, then workers, which by then have nothing left."""
    gateway = settings.gateway
    return gateway.shutdown_delay_seconds + gateway.drain_seconds + GRACE_BEYOND_DRAIN_SECONDS


def _write(prefix: str, line: bytes) -> None:
    """Pass a child's line on to standard error."""
    text = line.decode(errors="replace")
    with contextlib.suppress(OSError):  # the terminal is gone; the children need not die of it
        print(f"{prefix} | {text}" if prefix else text, file=sys.stderr, flush=True)
