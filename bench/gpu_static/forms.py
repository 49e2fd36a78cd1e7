"""What is compiled: every variant of every kernel for every architecture, or a subset that covers pairs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sfllm_worker.kernels.variant import Variant

ARCHITECTURES = (80, 89, 90, 100)
"""Compute capabilities times ten: A100, L4 and RTX 40, H100 and H200, B200."""

# Constants that choose code paths, as all kernels name them; others only change loop bounds and strides.
_DIMENSIONS = ("DIM", "WINDOWED", "KIND", "NORMED", "ADDED", "POST", "SCALED")
# What matters to an architecture by itself: types of its products and the room for their tiles. Kernels are
# compiled differently by the generation of the matrix units, which sm_80 and sm_89 share.
_WITH_ARCHITECTURE = ("type", "DIM")
_GENERATION = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}


class Form(NamedTuple):
    """One variant of one kernel module, compiled for one architecture."""

    module: str
    """The kernel module's own name, without the package."""
    variant: str
    architecture: int

    @property
    def name(self) -> str:
        """How tables and messages call it."""
        return f"{self.variant} sm_{self.architecture}"


class CatalogueError(Exception):
    """The kernels' lists of variants contradict each other."""


def kernel_variants() -> dict[tuple[str, str], Variant]:
    """The variants of all kernel modules by module and name; imports triton.

    Raises `CatalogueError` when two variants have one name.
    """
    import sfllm_worker.kernels as package  # noqa: PLC0415 - its modules bring triton in

    found: dict[tuple[str, str], Variant] = {}
    names: dict[str, str] = {}
    for entry in sorted(pkgutil.iter_modules(package.__path__), key=lambda entry: entry.name):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        for variant in module.variants() if hasattr(module, "variants") else ():
            other = names.setdefault(variant.name, entry.name)
            if (entry.name, variant.name) in found or other != entry.name:
                raise CatalogueError(f"two variants are called {variant.name}, in {other} and {entry.name}")
            found[entry.name, variant.name] = variant
    return found


def all_forms(variants: Mapping[tuple[str, str], Variant]) -> list[Form]:
    """Every variant for every architecture that has its instructions."""
    return [
        Form(*key, architecture)
        for key, variant in variants.items()
        for architecture in ARCHITECTURES
        if architecture >= variant.min_capability
    ]


def features(module: str, variant: Variant) -> frozenset[str]:
    """What tells a variant from others of its kernel: element type and the constants that choose its code."""
    types = set(variant.signature.values())
    element = next((kind for kind in ("bf16", "fp16", "fp32") if f"*{kind}" in types), "integer")
    kernel = f"{module}.{variant.kernel.__name__}"
    constants = [f"{name}={variant.constants[name]}" for name in _DIMENSIONS if name in variant.constants]
    return frozenset([f"kernel={kernel}", f"type={element}", *constants])


def pairwise(described: dict[Form, frozenset[str]]) -> list[Form]:
    """A small subset in which every two features that some form has together are together in one form.

    The architecture counts as a feature beside element types and head sizes, and its generation beside
    kernels. Greedy and without chance: the form with the most new pairs is next, the first of several.
    """
    pairs = {form: _pairs(form, given) for form, given in described.items()}
    missing = set().union(*pairs.values()) if pairs else set()
    chosen = []
    while missing:
        best = max(pairs, key=lambda form: len(pairs[form] & missing))
        chosen.append(best)
        missing -= pairs.pop(best)
    return chosen


def _pairs(form: Form, given: frozenset[str]) -> set[tuple[str, str]]:
    of_architecture = {feature for feature in given if feature.startswith(_WITH_ARCHITECTURE)}
    with_architecture = {(feature, f"sm={form.architecture}") for feature in of_architecture}
    kernel = next(feature for feature in given if feature.startswith("kernel="))
    with_architecture.add((kernel, _GENERATION[form.architecture]))
    return with_architecture | set(combinations(sorted(given), 2))
