"""Everything that was found out about a stack, for the checks to judge."""

from __future__ import annotations

from typing import Any, NamedTuple

from sfllm_cli.doctor.certificate import Certificate
from sfllm_cli.doctor.key_files import ApiKeyFile, LinkKeyFile
from sfllm_cli.doctor.machine import Machine
from sfllm_cli.doctor.probe import Answer
from sfllm_cli.doctor.samples import Samples


class Process(NamedTuple):
    """One process, asked at one port. `before` and `after` are its metrics at the two looks."""

    address: str
    health: Answer
    ready: Answer
    version: Answer
    before: Samples = Samples()
    after: Samples = Samples()
    occupant: str = ""
    """Which program has the port, as far as this machine tells."""
    url: str = ""

    @property
    def name(self) -> str:
        """What to call it in a finding."""
        return f"{self.after.role or 'process'} at {self.address}"

    @property
    def tls(self) -> bool:
        """Whether it was asked by HTTPS."""
        return self.url.startswith("https:")

    @property
    def known(self) -> bool:
        """Whether it is a process of sfllm that tells its metrics."""
        return self.after.role is not None


class Api(NamedTuple):
    """What only the gateway's API tells. `unkeyed` and `keyed` are its list of models, asked both ways."""

    process: Process
    unkeyed: Answer = Answer()
    keyed: Answer | None = None
    info: Answer = Answer()
    tokenizers: dict[str, Answer] = {}  # noqa: RUF012 - never changed
    exposed: bool = False
    """Whether it listens beyond this machine's loopback."""
    remote: bool = False
    """Whether the address that was asked is not a loopback one."""
    certificate: Certificate | None = None

    @property
    def answers(self) -> bool:
        """Whether there is a gateway."""
        return self.process.health.fields().get("status") == "healthy"

    @property
    def models(self) -> list[dict[str, Any]]:
        """The models that it knows; empty as well where it does not tell."""
        models = self.info.fields().get("models")
        return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []


class Evidence(NamedTuple):
    """All of it. `machine` is None when nothing of the stack is on this machine."""

    api: Api
    processes: tuple[Process, ...]
    machine: Machine | None
    elsewhere: bool = False
    """Whether something that was asked is not on this machine."""
    api_keys: ApiKeyFile | None = None
    link_keys: tuple[LinkKeyFile, ...] = ()

    def of_role(self, role: str) -> list[Process]:
        """The processes of this kind that were asked at their admin ports."""
        return [process for process in self.processes if process.after.role == role]

    def gateways(self) -> list[Process]:
        """The gateways; the one behind the API only where no admin port shows one."""
        found = self.of_role("gateway")
        return found or ([self.api.process] if self.api.process.known else [])

    def everyone(self) -> list[Process]:
        """The gateway behind the API and all processes of the admin ports that are sfllm's."""
        first = [self.api.process] if self.api.answers else []
        return [*first, *(process for process in self.processes if process.known)]
