"""The version of this gateway."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("sfllm")
except PackageNotFoundError:  # run from a source tree that is not installed
    VERSION = "0"
