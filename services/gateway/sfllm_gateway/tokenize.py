"""Text to token ids in a small thread pool.

`encode_batch_fast` releases the interpreter lock, which `encode` does not: a long
prompt must not stop every stream of the process.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tokenizers import Tokenizer

THREADS = 4

T = TypeVar("T")


class TextPool:
    """Threads for work on text that is too long for the event loop. Owned until `close`."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="text")

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, made in a thread; its exception is raised here."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Start nothing more; what runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def encode(tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool) -> list[array[int]]:
    """Token ids of each text; `add_special_tokens` puts what the tokenizer puts around a text (bos)."""
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    return [array("I", item.ids) for item in encoded]


def decode(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
    """The text of each list of token ids."""
    texts: list[str] = tokenizer.decode_batch(
        [list(ids) for ids in prompts], skip_special_tokens=skip_special_tokens
    )
    return texts
