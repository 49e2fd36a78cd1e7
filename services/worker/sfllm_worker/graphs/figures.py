"""What is known of a worker's CUDA graphs, for metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class GraphFigures:
    """Counts since the start."""

    captured: int = 0
    capture_seconds: float = 0.0
    memory_bytes: int = 0
    """Device memory that captures took, each measured by itself."""
    replays: int = 0
    """Steps that were a graph."""
    eager_steps: int = 0
    """Steps launched operation by operation: prefills, and decodes that no graph holds."""
    padding_rows: int = 0
    """Rows of replays that belonged to no sequence."""
