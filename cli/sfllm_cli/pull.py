"""`sfllm pull NAME`: fetch a model's files and print where they lie."""

from __future__ import annotations

from collections.abc import Sequence

from sfllm.config import parse
from sfllm.model_files import resolve_model
from sfllm_cli.settings import PullSettings, known_settings, positional_model


def run(argv: Sequence[str]) -> int:
    """Fetch and print the path, alone on standard output. Raises `ModelFilesError`."""
    settings = parse(
        PullSettings,
        prog="sfllm pull [NAME]",
        description="Fetch a model's files and print where they lie.",
        argv=positional_model(argv),
        known=known_settings(),
    )
    print(resolve_model(settings.model))
    return 0
