"""`sfllm chat`: through a pipe as a process, and in a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time

from openai_server import OpenAIServer

COMMAND = (sys.executable, "-m", "sfllm_cli", "chat")
WAIT_SECONDS = 30


def ask(server: OpenAIServer, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--url", server.url, *flags]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
    )


def test_a_question_through_a_pipe_is_answered(server: OpenAIServer) -> None:
    finished = ask(server, "hi\n", "--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "9")
    assert (finished.returncode, finished.stdout) == (0, "Hello there!\n")
    (request,) = server.requests
    assert request["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("tiny", 0.5, 9)


def test_an_empty_pipe_is_a_readable_error(server: OpenAIServer) -> None:
    finished = ask(server, "")
    assert finished.returncode == 1
    assert "nothing came through the pipe" in finished.stderr


def test_a_stream_that_breaks_off_fails_the_command(server: OpenAIServer) -> None:
    server.cut_streams = True
    finished = ask(server, "hi")
    assert finished.returncode == 1
    assert "the stream ended without [DONE]" in finished.stderr


def test_what_the_model_writes_cannot_steer_the_terminal(server: OpenAIServer) -> None:
    server.answer = ("a\x1b[2J", "b\x9b1m")
    assert ask(server, "hi").stdout == "a[2Jb1m\n"


class Terminal:
    """`sfllm chat` in a pseudo-terminal."""

    def __init__(self, server: OpenAIServer) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # a background job of a shell inherits that it is ignored
            environment = {**os.environ, "TERM": "dumb"}
            os.execve(sys.executable, [*COMMAND, "--url", server.url], environment)
        self._seen = ""

    def until(self, text: str, *, repeat: str = "") -> str:
        """What came up to and including `text`; types `repeat` whenever nothing comes for a while."""
        deadline = time.monotonic() + WAIT_SECONDS
        while text not in self._seen:
            assert time.monotonic() < deadline, f"{text!r} did not come after {self._seen!r}"
            if select.select([self._terminal], [], [], 0.5)[0]:
                self._seen += os.read(self._terminal, 4096).decode()
            elif repeat:
                self.type(repeat)
        shown, found, self._seen = self._seen.partition(text)
        return shown + found

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def end(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(status)


def test_a_conversation_remembers_until_it_is_cleared(server: OpenAIServer) -> None:
    terminal = Terminal(server)
    terminal.until("> ")
    for line in ("first", "second"):
        terminal.type(f"{line}\n")
        terminal.until("Hello there!")
        terminal.until("> ")
    terminal.type("/clear\n")
    terminal.until("forgotten")
    terminal.type("third\n")
    terminal.until("Hello there!")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    spoken = [[message["content"] for message in request["messages"]] for request in server.requests]
    assert spoken == [["first"], ["first", "Hello there!", "second"], ["third"]]


def test_ctrl_c_on_an_empty_line_stays_and_exit_leaves(server: OpenAIServer) -> None:
    terminal = Terminal(server)
    terminal.until("> ")
    terminal.type("\x03")
    # A Ctrl-C in the instant before input() waits is seen with the next key only.
    terminal.until("> ", repeat="\x03")
    terminal.type("/nonsense\n")
    terminal.until("there is no /nonsense")
    terminal.until("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0
