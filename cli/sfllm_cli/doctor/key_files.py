"""Files of keys on this machine: what they hold, and who may read and change them."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple

from sfllm.api_keys import parse_keys


class ApiKeyFile(NamedTuple):
    """A file of hashed API keys. `mode` are its permissions; `fault` is why it cannot be used."""

    path: str
    mode: int = 0
    keys: int = 0
    fault: str = ""


def read_api_keys(path: str) -> ApiKeyFile:
    """What a gateway would make of the file."""
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
        return ApiKeyFile(path, mode, len(parse_keys(Path(path).read_text(encoding="utf-8"))))
    except OSError as error:
        return ApiKeyFile(path, fault=error.strerror or str(error))
    except ValueError as error:
        return ApiKeyFile(path, fault=str(error))
