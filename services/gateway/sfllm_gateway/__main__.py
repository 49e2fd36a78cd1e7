"""`python -m sfllm_gateway`: run one gateway process."""

from __future__ import annotations

import sys

import uvloop

from sfllm import logs
from sfllm.config import parse
from sfllm.settings import GatewaySettings, SchedulerSettings, WorkerSettings
from sfllm_gateway.service import UnusableSettingError, serve


def main() -> int:
    """Serve until told to stop; 0 after an orderly end, 1 if it cannot listen, 2 for unusable settings."""
    settings = parse(
        GatewaySettings,
        prog="python -m sfllm_gateway",
        description="The HTTP gateway of sfllm: OpenAI's API in front of a scheduler.",
        known=(GatewaySettings, SchedulerSettings, WorkerSettings),
    )
    logs.setup("gateway", settings.log_level, settings.log_format)
    try:
        uvloop.run(serve(settings))
    except UnusableSettingError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2  # as for a wrong flag: starting again would not help
    except OSError as error:
        print(f"gateway: cannot serve at {settings.host}:{settings.port}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
