"""The version of sfllm that this process runs, and that of the protocol that it speaks."""

from importlib.metadata import PackageNotFoundError, version

from sfllm.wire import PROTOCOL_VERSION

try:
    VERSION = version("sfllm")
except PackageNotFoundError:  # run from a source tree that is not installed
    VERSION = "0"

VERSIONS: dict[str, str | int] = {"version": VERSION, "protocol": PROTOCOL_VERSION}
"""What `GET /version` answers: processes that speak different protocols cannot work together."""
