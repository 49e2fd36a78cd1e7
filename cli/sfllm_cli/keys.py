"""`sfllm keys add NAME FILE`: make an API key, print it once and store its hash.

`sfllm keys links DIR` makes the keys by which gateways, scheduler and workers know each other.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sfllm import link_keys
from sfllm.api_keys import key_line, new_key, parse_keys
from sfllm_cli.errors import CommandError

OWNER_ONLY = 0o600


def run(argv: Sequence[str]) -> int:
    """Make what is asked for; an API key goes alone to standard output. Raises `CommandError`."""
    parser = argparse.ArgumentParser(
        prog="sfllm keys", description="API keys for the gateway, and keys of the links between the services."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "make a key, print it and add its hash to a file for --api-key-file"
    add = commands.add_parser("add", help=text, description=text)
    add.add_argument("name", metavar="NAME", help="whose key it is: the name of the tenant")
    add.add_argument("file", metavar="FILE", type=Path, help="the file; made if it does not exist")
    text = "make keys for gateways, scheduler and workers, a folder of DIR for each; keys that are there stay"
    link_keys.add_arguments(commands.add_parser("links", help=text, description=text))
    arguments = parser.parse_args(argv)
    if arguments.command == "links":
        return _links(arguments)
    key = new_key()
    try:
        _append(arguments.file, key_line(arguments.name, key))
    except (OSError, ValueError) as error:
        raise CommandError(f"no key was added to {arguments.file}: {error}") from error
    print(f"The key of {arguments.name}, which is stored nowhere else:", file=sys.stderr)
    print(key)
    return 0


def _links(arguments: argparse.Namespace) -> int:
    try:
        link_keys.run(arguments)
    except link_keys.LinkKeysError as error:
        raise CommandError(str(error)) from error
    return 0


def _append(file: Path, line: str) -> None:
    """Add a line with one write, so that whoever reads meanwhile sees all of it or nothing."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if before.strip():
        parse_keys(before)
    start = "" if not before or before.endswith("\n") else "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, OWNER_ONLY)
    try:
        os.write(descriptor, (start + line).encode())
    finally:
        os.close(descriptor)
