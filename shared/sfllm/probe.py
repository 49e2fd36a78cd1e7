"""Asks a service of this machine whether it is well: `python3 -m sfllm.probe [PATH]`, for health checks.

It asks SFLLM_ADMIN_PORT at SFLLM_ADMIN_HOST for /health or for PATH. Exits with 0 if the answer is 200, else
with 1 and the reason. Health checks start it every few seconds, with the fewest imports that will do; unlike
urllib it never asks a proxy, which a container may have been given for other things.
"""

import os
import socket
import sys

TIMEOUT_SECONDS = 4.0
DEFAULT_PORT = 9090
EVERYWHERE = ("", "0.0.0.0", "::")


def ask(host: str, port: int, path: str) -> str:
    """The first line of the answer, such as `HTTP/1.1 200 OK`. Raises `OSError`."""
    with socket.create_connection((host, port), timeout=TIMEOUT_SECONDS) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            return answer.readline(200).decode("latin-1").strip()


def main(arguments: list[str]) -> int:
    """0 if the service says that it is well."""
    path = arguments[0] if arguments else "/health"
    host = os.environ.get("SFLLM_ADMIN_HOST", "")
    if host in EVERYWHERE:
        host = "127.0.0.1"
    port = int(os.environ.get("SFLLM_ADMIN_PORT") or DEFAULT_PORT)
    try:
        status = ask(host, port, path)
    except OSError as error:
        print(f"{host} port {port} does not answer: {error}")
        return 1
    print(status)
    return 0 if status.split(" ")[1:2] == ["200"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
