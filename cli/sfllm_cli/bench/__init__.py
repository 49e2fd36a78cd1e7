"""`sfllm bench`: measures one server or compares several, under loads of many kinds."""

from sfllm_cli.bench.command import run

__all__ = ["run"]
