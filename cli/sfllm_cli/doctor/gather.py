"""Asks a stack everything once, and for what moves a second time."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import aiohttp
import psutil

from sfllm_cli.doctor.certificate import is_loopback, read_certificate
from sfllm_cli.doctor.evidence import Api, Evidence, Process
from sfllm_cli.doctor.key_files import read_api_keys, read_link_keys
from sfllm_cli.doctor.machine import look_around
from sfllm_cli.doctor.probe import Answer, ask
from sfllm_cli.doctor.samples import Samples, read_samples
from sfllm_cli.doctor_settings import DoctorSettings

MOST_MODELS = 32


class Listener(NamedTuple):
    """A listening socket: its address, and its process if that may be known."""

    address: str
    process: int | None


async def gather(settings: DoctorSettings) -> Evidence:
    """What the checks need. Processes that do not answer are part of it."""
    timeout = aiohttp.ClientTimeout(total=settings.timeout_seconds)
    url = settings.url.rstrip("/").removesuffix("/v1")
    async with aiohttp.ClientSession(timeout=timeout) as session:
        first = asyncio.gather(*(_process(session, f"http://{address}") for address in settings.admin))
        api, processes = await asyncio.gather(_api(session, url, settings), first)
        await asyncio.sleep(settings.sample_seconds)
        again = await asyncio.gather(*(_again(session, process) for process in (api.process, *processes)))
    hosts = {urlsplit(name).hostname or "" for name in (url, *(f"//{item}" for item in settings.admin))}
    here = [await _is_here(host) for host in hosts]
    machine = await asyncio.to_thread(look_around, os.environ) if any(here) else None
    return Evidence(
        api._replace(process=again[0]),
        tuple(again[1:]),
        machine,
        elsewhere=not all(here),
        api_keys=read_api_keys(settings.api_key_file) if settings.api_key_file else None,
        link_keys=read_link_keys(settings.link_keys),
    )


async def _process(session: aiohttp.ClientSession, url: str) -> Process:
    paths = ("/health", "/ready", "/version", "/metrics")
    health, ready, version, metrics = await asyncio.gather(*(ask(session, url + path) for path in paths))
    parts = urlsplit(url)
    samples = _samples(metrics)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = f"[{parts.hostname}]:{port}" if ":" in (parts.hostname or "") else f"{parts.hostname}:{port}"
    known = samples.role is not None or health.failure in ("refused", "unreachable")
    occupant = "" if known or not await _is_here(parts.hostname or "") else _occupant(port)
    return Process(address, health, ready, version, samples, samples, occupant, url)


async def _again(session: aiohttp.ClientSession, process: Process) -> Process:
    """The process with its metrics as they are now; as they were, where it does not tell them any more."""
    if not process.known:
        return process
    late = _samples(await ask(session, f"{process.url}/metrics"))
    return process._replace(after=late) if late.role == process.before.role else process


def _samples(answer: Answer) -> Samples:
    try:
        return read_samples(answer.body) if answer.ok else Samples()
    except ValueError:  # it is something else that answers there; the checks say so
        return Samples()


async def _api(session: aiohttp.ClientSession, url: str, settings: DoctorSettings) -> Api:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    process = await _process(session, url)
    addresses = await _addresses(host)
    remote = any(not is_loopback(address) for address in addresses)
    api = Api(process, remote=remote, exposed=remote or _listens_beyond_loopback(port))
    if not api.answers:
        return api
    key = settings.api_key
    api = api._replace(
        unkeyed=await ask(session, f"{url}/v1/models"),
        keyed=await ask(session, f"{url}/v1/models", key) if key else None,
        info=await ask(session, f"{url}/get_server_info", key),
    )
    names = [str(model.get("id")) for model in api.models][:MOST_MODELS]
    infos = [ask(session, f"{url}/tokenizer_info?model={quote(name, safe='')}", key) for name in names]
    certificate = None
    if process.tls:
        certificate = await asyncio.to_thread(read_certificate, host, port, settings.timeout_seconds)
    return api._replace(
        tokenizers=dict(zip(names, await asyncio.gather(*infos), strict=True)), certificate=certificate
    )


async def _addresses(host: str) -> Sequence[str]:
    """The addresses of a name; none of one that is not known."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:  # that it cannot be reached is what the checks say
        return ()
    return [str(entry[4][0]) for entry in found]


async def _is_here(host: str) -> bool:
    own = {item.address.partition("%")[0] for items in psutil.net_if_addrs().values() for item in items}
    return any(is_loopback(address) or address in own for address in await _addresses(host))


def _listens_beyond_loopback(port: int) -> bool:
    """Whether something on this machine listens at that port for others than this machine.

    Systems that show this to root alone tell nothing; then the address that was asked has to do.
    """
    return any(not is_loopback(listener.address) for listener in _listeners(port))


def _occupant(port: int) -> str:
    """The program that listens there, if this user may know it."""
    for listener in _listeners(port):
        if listener.process is not None:
            try:
                return f"{psutil.Process(listener.process).name()}, process {listener.process}"
            except psutil.Error:  # it ended a moment ago
                return ""
    return ""


def _listeners(port: int) -> list[Listener]:
    """What listens at that port, as far as this system shows it to this user."""
    try:
        everything = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return []
    return [
        Listener(found.laddr.ip, found.pid)
        for found in everything
        if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port
    ]
