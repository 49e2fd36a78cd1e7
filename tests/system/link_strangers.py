"""Workers that the scheduler should not let in."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from host_stacks import own, worker_addresses
from two_hosts import TwoHosts

from sfllm.link_keys import key_file, make_link_keys

Keys = Literal["none", "of another scheduler", "of nobody"]
"""Of another scheduler: a sound file. Of nobody: the right scheduler, and a key that it never saw."""


@contextmanager
def stranger(hosts: TwoHosts, keys: Keys) -> Iterator[None]:
    """A worker on host b that tries to join with such keys."""
    engine = hosts.b.engine
    options = ["--env", "SFLLM_INSECURE_LINKS=1"]
    if keys != "none":
        folder = _foreign_keys(hosts.b.directory, keys)
        options = ["--volume", f"{folder}:/links:ro", "--env", "SFLLM_LINK_KEYS=/links/link.keys"]
    run = ("run", "--detach", "--init", "--name", "stranger", *options, "sfllm-worker", "--mock")
    engine.run(*run, *worker_addresses(hosts.a))
    try:
        yield
    finally:
        print(engine.run("logs", "stranger"))
        engine.run("rm", "--force", "stranger")


def _foreign_keys(directory: Path, keys: Keys) -> Path:
    elsewhere = directory / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    make_link_keys(elsewhere)
    file = key_file(elsewhere, "worker")
    if keys == "of nobody":
        scheduler = re.compile(r"^scheduler-key = .*$", re.MULTILINE)
        right = scheduler.search((directory / "links" / file.name).read_text())
        assert right is not None
        file.write_text(scheduler.sub(lambda _: right[0], file.read_text()))
    own(file.parent)
    return file.parent
