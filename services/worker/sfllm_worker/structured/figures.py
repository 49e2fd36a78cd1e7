"""What is known of a worker's grammars, for metrics."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass
class GrammarFigures:
    """Counts since the start, and durations that nobody has read yet. Safe to add to from any thread."""

    asked: int = 0
    """Times that a sequence wanted a grammar."""
    found: int = 0
    """Those of them whose grammar was compiled already, or being compiled."""
    compile_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    """Of grammars whose compilation ended, in an error too: to be taken away by who reads them."""
