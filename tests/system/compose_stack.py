"""A compose stack that is up, and how to give it commands."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from docker_engine import Engine


@dataclass(frozen=True)
class Stack:
    """The files and variables of a stack, and the engine that runs it."""

    engine: Engine
    arguments: tuple[str, ...]
    variables: dict[str, str]

    def compose(self, *arguments: str, seconds: float = 300) -> str:
        return self.engine.run_compose(*self.arguments, *arguments, seconds=seconds, **self.variables).stdout

    def up(self, *services: str) -> None:
        """Start these services, or all, from images that are there, and wait until they are healthy."""
        self.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", "240", *services)

    def container(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service).strip()

    def inspect(self, service: str, template: str) -> str:
        return self.engine.run("inspect", "--format", template, self.container(service)).stdout.strip()


@contextmanager
def until_down(stack: Stack) -> Iterator[None]:
    """Show the logs and remove everything at the end, whatever has come up."""
    try:
        yield
    finally:
        print(stack.compose("logs", "--no-color", "--tail", "200"))
        stack.compose("down", "--volumes", "--timeout", "10")


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
