"""Writes docs/configuration.md from the settings themselves: `python -m sfllm_cli.settings_docs FILE`."""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any

import msgspec

from sfllm.config import ENV_PREFIX, Settings, options
from sfllm.settings import GatewaySettings, SchedulerSettings, WorkerSettings
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.doctor_settings import DoctorSettings
from sfllm_cli.settings import BatchSettings, ChatSettings, PullSettings, ServeSettings

_SECTIONS: tuple[tuple[str, str, type[Settings]], ...] = (
    (
        "sfllm serve",
        "Starts the three services below on one machine, and takes all of their flags as well.",
        ServeSettings,
    ),
    ("Gateway", "`python -m sfllm_gateway`: the HTTP API.", GatewaySettings),
    ("Scheduler", "`python -m sfllm_scheduler`: the queue in the middle.", SchedulerSettings),
    ("Worker", "`python -m sfllm_worker`: runs the model.", WorkerSettings),
    ("sfllm chat", "Talks to a served model in the terminal.", ChatSettings),
    ("sfllm batch", "Answers a file of requests: [batch.md](batch.md).", BatchSettings),
    (
        "sfllm bench",
        "Measures servers: [benchmarking.md](benchmarking.md).",
        BenchSettings,
    ),
    (
        "sfllm doctor",
        "Looks at a running stack and says what to mend: [doctor.md](doctor.md).",
        DoctorSettings,
    ),
    ("sfllm pull", "Fetches a model and prints where it lies.", PullSettings),
)

_INTRODUCTION = """\
<!-- Made by `make docs` from the settings in the code: edit their descriptions there. -->

# Configuration

Every setting is a flag, an environment variable and a key of an optional YAML file. A flag goes
before its variable, that before the file, that before the default. `--help` of each program shows
the same tables.

```yaml
# sfllm.yaml, used by: sfllm serve --config sfllm.yaml   (or SFLLM_CONFIG=sfllm.yaml)
model: smollm2
port: 8081
served-model-name: [smollm2, default]
max-queue-requests: 256
```

A key that no setting has is an error, not ignored. One file may hold the settings of all services.

Two variables are no settings of a service: `SFLLM_CACHE_DIR` is where models are downloaded and
converted to (default `$XDG_CACHE_HOME/sfllm`, or `~/.cache/sfllm`), and `SFLLM_MODEL_PATH` is another
name of `SFLLM_MODEL`. Models from a hub lie where its own client puts them (`HF_HOME`);
`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` apply.
"""


def render() -> str:
    """The document."""
    return "\n".join([_INTRODUCTION, *(_section(*section) for section in _SECTIONS)])


def _section(title: str, text: str, cls: type[Settings]) -> str:
    lines = [f"## {title}", "", text, "", "| flag | variable | default | meaning |", "|---|---|---|---|"]
    for option in options(cls):
        variable = ENV_PREFIX + option.name.upper()
        values = _values(option.type)
        meaning = f"{option.help} ({values})" if values else option.help
        default = _default(option.default)
        lines.append(
            f"| `{option.flag}` | `{variable}` | {default} | {meaning.replace('|', chr(92) + '|')} |"
        )
    return "\n".join([*lines, ""])


def _default(value: Any) -> str:
    if value is msgspec.NODEFAULT:
        return "required"
    if value is None or value in ("", ()):
        return "unset"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(hint: Any) -> str:
    """The values that a choice allows."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is not typing.Literal:
        return ""
    return ", ".join(f"`{value}`" for value in typing.get_args(hint))


def main() -> int:
    """Write the file that is named as the argument."""
    if len(sys.argv) != 2:
        print("usage: python -m sfllm_cli.settings_docs FILE", file=sys.stderr)
        return 2
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
