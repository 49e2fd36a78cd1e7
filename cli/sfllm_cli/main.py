"""The `sfllm` command: picks the subcommand and turns its failures into one readable line."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence

from sfllm.link_keys import LinkKeysError
from sfllm.model_files import ModelFilesError
from sfllm_cli.errors import CommandError

_COMMANDS = {
    "serve": "serve a model on this machine: gateway, scheduler and worker processes",
    "chat": "talk to a served model in the terminal",
    "batch": "answer a file of requests, and go on after an interruption",
    "bench": "measure a server: latency and throughput under load",
    "simulate": "a fleet of any size behind the real scheduler, in virtual time",
    "replay": "decide again what a scheduler's flight record tells of, and compare",
    "doctor": "look at a running stack from the outside and say what to mend",
    "keys": "make an API key for the gateway's file of hashed keys",
    "pull": "fetch a model's files and print where they lie",
    "version": "print the version",
}
INTERRUPTED_EXIT_CODE = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command in ("version", "--version", "-V"):
        print(f"sfllm {importlib.metadata.version('sfllm')}")
        return 0
    if command not in _COMMANDS:
        print(_unknown(command), file=sys.stderr)
        return 2
    # Imported when chosen: `sfllm pull` need not wait for what `sfllm bench` uses.
    run: Callable[[list[str]], int] = importlib.import_module(f"sfllm_cli.{command}").run
    try:
        return run(arguments[1:])
    except (CommandError, ModelFilesError, LinkKeysError) as error:
        print(f"sfllm {command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, LinkKeysError) else 1  # the services' own code for it
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE


def _help() -> str:
    width = max(len(name) for name in _COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, text in _COMMANDS.items()]
    return "\n".join(
        (
            "usage: sfllm COMMAND [OPTIONS]",
            "",
            "Serve large language models through an OpenAI-compatible API.",
            "",
            *lines,
            "",
            "`sfllm COMMAND --help` lists the options. A first try: `sfllm serve`, then `sfllm chat`.",
        )
    )


def _unknown(command: str) -> str:
    close = difflib.get_close_matches(command, _COMMANDS, n=1)
    hint = f"did you mean `sfllm {close[0]}`?" if close else "`sfllm --help` lists the commands."
    return f"sfllm: there is no command {command!r}; {hint}"
