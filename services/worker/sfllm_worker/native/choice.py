"""Which of the kernels' variants serves on this machine."""

from __future__ import annotations

import ctypes
import functools
import logging

from sfllm.model_files import cache_directory
from sfllm_worker.native.build import BuildError, build
from sfllm_worker.native.library import open_library
from sfllm_worker.native.tiles import has_tiles, tiles_work

_log = logging.getLogger(__name__)

THIS_CPU = ("-march=native",)
WITH_TILES = (*THIS_CPU, "-DSFLLM_TILES")


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The kernels for this machine, or None, with one warning, where they cannot be had."""
    cache = cache_directory() / "kernels"
    try:
        if has_tiles() and tiles_work(path := build(cache, WITH_TILES)):
            return open_library(path)
        return open_library(build(cache, THIS_CPU))
    except (BuildError, OSError) as error:
        _log.warning("no native kernels, so the model runs in plain torch, several times slower: %s", error)
        return None
