"""Runs a client in an environment of its own, as a user's program would, and reads what it says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-clients"
SCRIPTS = Path(__file__).parent / "scripts"
NODE_SCRIPTS = Path(__file__).parent / "node"
SECONDS = 120
"""For one script; a machine under load needs a few of them."""


class Clients:
    """Clients of one running server."""

    def __init__(self, url: str, key: str, model: str, home: Path) -> None:
        self.url = url
        self.key = key
        self.model = model
        self.home = home
        """Where clients may keep what they like to keep, instead of in the user's home."""

    def run(self, environment: str, script: str) -> dict[str, Any]:
        """What a Python script printed, which is one JSON object."""
        python = installed(environment, "python")
        return self._answer([str(python), str(SCRIPTS / script)])

    def run_node(self, script: str) -> dict[str, Any]:
        """The same of a script for node."""
        node = shutil.which("node")
        if node is None:
            pytest.skip("NO CLIENT FOR NODE WAS TESTED: node is not installed")
        if not (NODE_SCRIPTS / "node_modules" / ".installed").exists():
            pytest.fail("the packages for node are missing: `make clients` installs them")
        return self._answer([node, str(NODE_SCRIPTS / script)])

    def command(self, environment: str, program: str, *arguments: str, seconds: float = SECONDS) -> str:
        """What a command of an environment printed."""
        return self.output([str(installed(environment, program)), *arguments], seconds)

    def output(self, command: list[str], seconds: float = SECONDS) -> str:
        """What a command printed, which must have succeeded. Variables tell it where the server is."""
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "LLM_USER_PATH": str(self.home),
            "NO_COLOR": "1",
            "PYTHONUTF8": "1",
            "SERVER_URL": self.url,
            "SERVER_MODEL": self.model,
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": self.key,
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": self.key,
        }
        ended = subprocess.run(
            command,
            cwd=self.home,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert ended.returncode == 0, f"{command} failed:\n{ended.stdout[-6000:]}\n{ended.stderr[-6000:]}"
        return ended.stdout

    def _answer(self, command: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.output(command).splitlines()[-1])
        return found


def installed(environment: str, program: str) -> Path:
    """A program of a client's environment, which must be there."""
    directory = ENVIRONMENTS / environment
    if not (directory / ".installed").exists():
        pytest.fail(f"the clients of {environment!r} are not installed: `make clients` does it")
    return directory / "bin" / program
