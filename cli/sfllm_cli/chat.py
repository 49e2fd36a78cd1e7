"""`sfllm chat`: talk to a served model, in a terminal or through a pipe."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from rich.console import Console

from sfllm.config import parse
from sfllm_cli.client import ServerError, choose_model, open_session, stream_events
from sfllm_cli.errors import CommandError
from sfllm_cli.settings import ChatSettings, known_settings

ANSWER_SECONDS = 3600.0
_HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this"

# What a model writes must not steer the terminal.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

Message = dict[str, str]


def run(argv: Sequence[str]) -> int:
    """Chat until the user leaves, or answer what the pipe holds. Raises `CommandError`."""
    settings = parse(
        ChatSettings,
        prog="sfllm chat",
        description="Talk to a served model. With a pipe as input, answers it and ends.",
        argv=argv,
        known=known_settings(),
    )
    if not sys.stdin.isatty():
        return _answer_pipe(settings, sys.stdin.read().strip())
    return _converse(settings)


class Conversation:
    """The messages so far. Only complete exchanges are kept, so that a failure can be tried again."""

    def __init__(self, settings: ChatSettings, model: str) -> None:
        self._settings = settings
        self._model = model
        self._messages: list[Message] = []
        self.clear()

    def clear(self) -> None:
        """Forget all but the system message."""
        system = self._settings.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def request(self, question: str) -> dict[str, Any]:
        """The body that asks `question` next."""
        settings = self._settings
        optional = {
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "seed": settings.seed,
        }
        return {
            "model": self._model,
            "messages": [*self._messages, {"role": "user", "content": question}],
            "stream": True,
            **{name: value for name, value in optional.items() if value is not None},
        }

    def keep(self, question: str, answer: str) -> None:
        """Remember an exchange."""
        self._messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]


async def ask(
    session: aiohttp.ClientSession,
    settings: ChatSettings,
    conversation: Conversation,
    question: str,
    write: Callable[[str], None],
) -> None:
    """Stream the answer to `write`; what was answered before a Ctrl-C is kept as the answer.

    Raises `CommandError` when the server fails.
    """
    parts: list[str] = []

    async def stream() -> None:
        url = f"{settings.base_url}/v1/chat/completions"
        async for event in stream_events(session, url, conversation.request(question)):
            for choice in event.get("choices", ()):
                if text := choice.get("delta", {}).get("content"):
                    parts.append(text)
                    write(text.translate(_CONTROLS))

    answering = asyncio.create_task(stream())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, answering.cancel)
    try:
        await asyncio.wait([answering])
    finally:
        answering.cancel()
        loop.remove_signal_handler(signal.SIGINT)
    if not answering.cancelled() and (error := answering.exception()):
        if not isinstance(error, (ServerError, aiohttp.ClientError, TimeoutError, ValueError)):
            raise error
        raise CommandError(str(error) or type(error).__name__) from error
    conversation.keep(question, "".join(parts))


def _answer_pipe(settings: ChatSettings, question: str) -> int:
    """One question, one answer on standard output."""
    if not question:
        raise CommandError("nothing came through the pipe; try: echo 'Why is the sky blue?' | sfllm chat")

    async def answer() -> None:
        async with open_session(settings, ANSWER_SECONDS, 1) as session:
            conversation = Conversation(settings, await choose_model(session, settings))
            await ask(session, settings, conversation, question, _write)

    asyncio.run(answer())
    _write("\n")
    return 0


def _converse(settings: ChatSettings) -> int:
    """Read lines and answer them until the user leaves."""
    import readline  # noqa: F401, PLC0415 - importing it gives input() editing and history

    console = Console(highlight=False)
    with asyncio.Runner() as runner:
        session, model = runner.run(_connect(settings))
        try:
            console.print(f"[bold]{model}[/] at {settings.base_url}. {_HELP}.", style="dim")
            conversation = Conversation(settings, model)
            while (line := _read_line()) is not None:
                if line.startswith("/"):
                    if _command(line, conversation, console):
                        break
                elif line:
                    try:
                        runner.run(ask(session, settings, conversation, line, _write))
                    except CommandError as error:
                        console.print(str(error), style="red", markup=False)
                    _write("\n\n")
        finally:
            runner.run(session.close())
    return 0


async def _connect(settings: ChatSettings) -> tuple[aiohttp.ClientSession, str]:
    session = open_session(settings, ANSWER_SECONDS, 1)
    try:
        return session, await choose_model(session, settings)
    except BaseException:
        await session.close()
        raise


def _read_line() -> str | None:
    """The next line; None when the user leaves; an empty one for Ctrl-C, which clears the line."""
    try:
        return input("> ").strip()
    except EOFError:
        _write("\n")
        return None
    except KeyboardInterrupt:
        _write("\n")
        return ""


def _command(line: str, conversation: Conversation, console: Console) -> bool:
    """Do what a line with a slash says; whether it means to leave."""
    if line in ("/exit", "/quit"):
        return True
    if line == "/clear":
        conversation.clear()
        console.print("forgotten", style="dim")
    else:
        known = line == "/help"
        console.print(_HELP if known else f"there is no {line}: {_HELP}", style="dim", markup=False)
    return False


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
