"""The settings of each subcommand; those of the services appear in `serve` as they are."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from sfllm.config import Settings
from sfllm.link_keys import key_file
from sfllm.settings import CommonSettings, GatewaySettings, SchedulerSettings, WorkerSettings
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.doctor_settings import DoctorSettings
from sfllm_cli.simulate_settings import SimulateSettings

Addresses = tuple[str, ...]
T = TypeVar("T", bound=Settings)

ADDRESSES = ("gateway_address", "worker_address", "asset_address")
"""Where processes meet: `serve_plan.py` gives each service its own."""


class ServeSettings(CommonSettings, frozen=True, kw_only=True):
    """The processes."""

    model: Annotated[
        str, Meta(description="a model directory, a .gguf file, a hub id, or 'smollm2' for the default model")
    ] = "smollm2"
    workers: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | Literal["auto"],
        Meta(
            description="how many worker processes, which take the visible GPUs in turn; "
            "auto: one for each visible GPU, or one without any"
        ),
    ] = 1
    gateways: Annotated[
        int, Meta(ge=1, le=64, description="how many gateway processes; they share the port")
    ] = 1
    schedulers: Annotated[
        int, Meta(ge=1, le=16, description="how many scheduler processes; they share the requests")
    ] = 1
    admin_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65000,
            description="first of one port a process for /health and /metrics: "
            "schedulers, gateways, workers in turn; 0 for none",
        ),
    ] = 0
    gateway_address: Annotated[
        Addresses, Meta(description="where each scheduler and gateways meet; private socket files if unset")
    ] = ()
    worker_address: Annotated[
        Addresses, Meta(description="where each scheduler and workers meet; private socket files if unset")
    ] = ()
    asset_address: Annotated[
        Addresses, Meta(description="where tokenizer files pass; private socket files if unset")
    ] = ()
    link_keys: Annotated[
        str | None,
        Meta(
            description="folder that `sfllm keys links` made, where each process finds its own file of keys "
            "for the links between them; without it links are neither encrypted nor do they know their peers"
        ),
    ] = None
    max_restarts: Annotated[
        int, Meta(ge=1, description="deaths of one process in a minute, never ready, before giving up")
    ] = 5

    def __post_init__(self) -> None:
        """Refuse lists of addresses of another length than there are schedulers."""
        for name in ADDRESSES:
            given = len(getattr(self, name))
            if given not in (0, self.schedulers):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} has {given} for --schedulers {self.schedulers}")


class ServicesSettings(NamedTuple):
    """What `serve` was given, as each process will see it."""

    serve: ServeSettings
    gateway: GatewaySettings
    scheduler: SchedulerSettings
    worker: WorkerSettings


def _refuse_what_services_would(settings: ServeSettings) -> None:
    """So that it is a matter of usage, told before anything is started."""
    ServeSettings.__post_init__(settings)
    split(settings)


def _with_services() -> type[ServeSettings]:
    """`ServeSettings` and, in a group each, whatever else the services can be told.

    Made here rather than written out, so that a new setting of a service is a new flag of
    `serve`. A chain of structs, because msgspec structs cannot have two bases with fields.
    """
    chain: type[Any] = ServeSettings
    for service in (GatewaySettings, SchedulerSettings, WorkerSettings):
        taken = set(chain.__struct_fields__)
        hints = typing.get_type_hints(service, include_extras=True)
        fields = [
            (field.name, hints[field.name], field.default)
            for field in msgspec.structs.fields(service)
            if field.name not in taken
        ]
        chain = msgspec.defstruct(
            f"ServeWith{service.__name__}",
            fields,
            bases=(chain,),
            namespace={"__doc__": service.__doc__, "__post_init__": _refuse_what_services_would},
            frozen=True,
            kw_only=True,
            forbid_unknown_fields=True,
        )
    return chain


AllServeSettings = _with_services()
"""What the command line of `serve` reads: a subclass of `ServeSettings`."""


def split(settings: ServeSettings) -> ServicesSettings:
    """The settings of each service out of `AllServeSettings`; what is None keeps the service's default.

    So do addresses, which are not the same for every process. Each has its own file of keys.
    """
    given = msgspec.structs.asdict(settings).items()
    values = {name: value for name, value in given if value is not None and name not in ADDRESSES}

    def of(cls: type[T], role: str) -> T:
        folder = settings.link_keys
        return _of(cls, {**values, "link_keys": str(key_file(Path(folder), role)) if folder else None})

    return ServicesSettings(
        settings,
        of(GatewaySettings, "gateway"),
        of(SchedulerSettings, "scheduler"),
        of(WorkerSettings, "worker"),
    )


def _of(cls: type[T], values: Mapping[str, Any]) -> T:
    return msgspec.convert({name: values[name] for name in cls.__struct_fields__ if name in values}, cls)


class ClientSettings(Settings, frozen=True, kw_only=True):
    """The server."""

    url: Annotated[
        str | None, Meta(description="base address of the server; this machine and --port if unset")
    ] = None
    port: Annotated[int, Meta(ge=1, le=65535, description="the server's port on this machine")] = 8081
    model: Annotated[
        str | None, Meta(description="name of the model; the first that the server lists if unset")
    ] = None
    api_key: Annotated[str | None, Meta(description="key for a server that asks for one")] = None

    @property
    def base_url(self) -> str:
        """The server's address without a slash or `/v1` at the end."""
        return (self.url or f"http://127.0.0.1:{self.port}").rstrip("/").removesuffix("/v1")


class ChatSettings(ClientSettings, frozen=True, kw_only=True):
    """The conversation."""

    system: Annotated[str | None, Meta(description="system message")] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None,
        Meta(description="sampling temperature; the model's own if unset"),
    ] = None
    max_tokens: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="most tokens of an answer")] = (
        None
    )
    seed: Annotated[int | None, Meta(description="the same seed gives the same answer")] = None


class BatchSettings(ClientSettings, frozen=True, kw_only=True):
    """The batch."""

    model: Annotated[
        str | None,
        Meta(description="model to use in place of the one in each line; as the lines say if unset"),
    ] = None
    input: Annotated[str, Meta(description="file of requests, one JSON object a line; the first argument")]
    output: Annotated[
        str, Meta(description="file that answers are added to as they come; the second argument")
    ]
    errors: Annotated[
        str | None,
        Meta(description="file of what failed; the output with .errors before its last ending if unset"),
    ] = None
    retry_failed: Annotated[bool, Meta(description="try again what failed in earlier runs")] = True
    concurrency: Annotated[int, Meta(ge=1, le=10000, description="most requests open at once")] = 64
    timeout_seconds: Annotated[float, Meta(gt=0, description="a request that takes longer has failed")] = (
        600.0
    )
    max_retries: Annotated[
        int,
        Meta(
            ge=0,
            le=1000,
            description="how often a request is sent again when the server is full or cannot be reached; "
            "the wait doubles from half a second to 30 and is at least what Retry-After says",
        ),
    ] = 10


class PullSettings(Settings, frozen=True, kw_only=True):
    """The model."""

    model: Annotated[str, Meta(description="a hub id, or 'smollm2' for the default model")] = "smollm2"


SUBCOMMAND_SETTINGS: dict[str, type[Settings]] = {
    "serve": AllServeSettings,
    "chat": ChatSettings,
    "batch": BatchSettings,
    "bench": BenchSettings,
    "simulate": SimulateSettings,
    "doctor": DoctorSettings,
    "pull": PullSettings,
}


def known_settings() -> list[type[Settings]]:
    """Every settings struct that a YAML file shared by all commands may have keys of."""
    return list(SUBCOMMAND_SETTINGS.values())


def positional_model(argv: Sequence[str]) -> list[str]:
    """`NAME ...` read as `--model NAME ...`."""
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--model")
    return arguments
