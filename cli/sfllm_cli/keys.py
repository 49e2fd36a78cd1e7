"""`sfllm keys add NAME FILE`: make an API key, print it once and store its hash."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sfllm.api_keys import key_line, new_key, parse_keys
from sfllm_cli.errors import CommandError

OWNER_ONLY = 0o600


def run(argv: Sequence[str]) -> int:
    """Print the new key, alone on standard output. Raises `CommandError`."""
    parser = argparse.ArgumentParser(prog="sfllm keys", description="API keys for the gateway.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "make a key, print it and add its hash to a file for --api-key-file"
    add = commands.add_parser("add", help=text, description=text)
    add.add_argument("name", metavar="NAME", help="whose key it is: the name of the tenant")
    add.add_argument("file", metavar="FILE", type=Path, help="the file; made if it does not exist")
    arguments = parser.parse_args(argv)
    key = new_key()
    try:
        _append(arguments.file, key_line(arguments.name, key))
    except (OSError, ValueError) as error:
        raise CommandError(f"no key was added to {arguments.file}: {error}") from error
    print(f"The key of {arguments.name}, which is stored nowhere else:", file=sys.stderr)
    print(key)
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
