"""Lets Triton's interpreter run loops with bounds that a kernel computes, under every supported NumPy."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_bounds(tensor: type, scope: Any) -> None:
    """Do what the interpreter does, but take a bound out of its one-element array.

    Triton 3.6 converts the array itself, which NumPy 2.4 refuses.
    """
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_with_bounds
