"""The settings of `sfllm doctor`: where the stack is, and where the findings go."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta

from sfllm.config import SECRET, Settings


class DoctorSettings(Settings, frozen=True, kw_only=True):
    """The stack to look at."""

    url: Annotated[str, Meta(pattern=r"^https?://[^/]", description="address of the gateway")] = (
        "http://127.0.0.1:8081"
    )
    admin: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^(\[[^\]]+\]|[^:/]+):[0-9]{1,5}$")], ...],
        Meta(
            description="admin ports of schedulers, gateways and workers, as HOST:PORT; what they alone know "
            "is not checked if unset"
        ),
    ] = ()
    api_key: Annotated[
        str | None,
        Meta(
            description="key for a server that asks for one; better as a variable than as a flag, which "
            "everyone on the machine can read",
            extra=SECRET,
        ),
    ] = None
    api_key_file: Annotated[
        str | None, Meta(description="the gateway's file of API keys, to look at it as well")
    ] = None
    link_keys: Annotated[
        tuple[str, ...],
        Meta(description="files of the links' keys, or folders of `sfllm keys links`, to look at as well"),
    ] = ()
    json: Annotated[str | None, Meta(description="file to write the findings to; - for standard output")] = (
        None
    )
    sample_seconds: Annotated[
        float,
        Meta(ge=0, le=600, description="time between the two looks that tell whether a queue grows"),
    ] = 2.0
    timeout_seconds: Annotated[
        float, Meta(gt=0, le=600, description="longest wait for each answer of a process")
    ] = 5.0

    def __post_init__(self) -> None:
        """Refuse addresses that cannot be."""
        for flag, address in (("--url", self.url), *(("--admin", f"//{item}") for item in self.admin)):
            try:
                parts = urlsplit(address)
                possible = bool(parts.hostname) and parts.port != 0
            except ValueError:
                possible = False
            if not possible:
                raise ValueError(
                    f"{flag}: {address.removeprefix('//')} has no host, or no port from 1 to 65535"
                )
