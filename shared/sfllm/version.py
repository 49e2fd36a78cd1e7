"""The version of sfllm that this process runs."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("sfllm")
except PackageNotFoundError:  # run from a source tree that is not installed
    VERSION = "0"
