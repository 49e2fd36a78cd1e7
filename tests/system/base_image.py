"""A base image without a registry: Debian with Python, made here, that trusts what this machine trusts."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from docker_engine import Engine, EngineUnavailableError

NAME = "sfllm-test-base"
SLIM_NAME = "sfllm-test-slim"
ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "deploy" / "compose" / "compose.yaml"
SERVICES = ("scheduler", "worker", "gateway")
_PYTHON = ("usr-is-merged", "python3", "python3-venv", "ca-certificates")
_COMPANIONS = ("g++", "nginx-light", "prometheus", "prometheus-alertmanager")
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_DOCUMENTATION = ("doc", "info", "locale", "man")


def make_base_image(engine: Engine, directory: Path) -> str:
    """Import the image and return its name. Raises `EngineUnavailableError`.

    It stands in for the images of nginx, Prometheus and Alertmanager as well, which only a registry has.
    """
    # Its own image calls it so.
    alertmanager = '--customize-hook=ln -s prometheus-alertmanager "$1"/usr/bin/alertmanager'
    return _import_debian(engine, directory, NAME, (*_PYTHON, *_COMPANIONS), alertmanager)


def make_slim_image(engine: Engine, directory: Path) -> str:
    """The same with Python alone, and without what Debian's own slim images leave out."""
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _DOCUMENTATION]
    # mmdebstrap merges /usr with a script in Perl, which has done its work.
    perl = "usrmerge 'perl-modules-5*' 'libperl5*'"
    hooks = (
        f'--customize-hook=chroot "$1" apt-get purge --yes {perl}',
        '--customize-hook=rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*',
    )
    return _import_debian(engine, directory, SLIM_NAME, _PYTHON, *left_out, *hooks)


def _import_debian(
    engine: Engine, directory: Path, name: str, packages: tuple[str, ...], *options: str
) -> str:
    pip_conf = f"[global]\ncert = {_CERTIFICATES}\n"
    options = (
        *("--variant=minbase", f"--include={','.join(packages)}"),
        # A machine behind a proxy trusts its certificate; so must pip in the image.
        f"--customize-hook=copy-in {_CERTIFICATES} /etc/ssl/certs",
        f"--customize-hook=copy-in {directory}/pip.conf /etc",
        *options,
    )
    # An engine that has the image keeps it, and with it the layers that were built on it.
    recipe = repr((options, pip_conf, Path(_CERTIFICATES).read_text())).replace(str(directory), "")
    label = f"sfllm.recipe={hashlib.sha256(recipe.encode()).hexdigest()}"
    if engine.run("images", "--quiet", "--filter", f"label={label}", name).stdout.strip():
        return name
    if shutil.which("mmdebstrap") is None:
        raise EngineUnavailableError(
            "there is no mmdebstrap to make a base image with (apt install mmdebstrap)"
        )
    (directory / "pip.conf").write_text(pip_conf)
    rootfs = directory / "rootfs.tar"
    command = ["mmdebstrap", *options, "bookworm", str(rootfs)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if made.returncode != 0:
        raise EngineUnavailableError(f"mmdebstrap cannot make a base image:\n{made.stderr[-1500:]}")
    engine.run("import", "--change", f"LABEL {label}", str(rootfs), name, seconds=300)
    rootfs.unlink()
    return name


def build_images(engine: Engine, directory: Path) -> dict[str, str]:
    """Build what the compose file builds; the variables by which it finds the images. Raises as above."""
    base = make_base_image(engine, directory)
    # The build reaches this machine's loopback, where the wheel is.
    override = directory / "build.yaml"
    override.write_text(json.dumps({"services": {name: {"build": {"network": "host"}} for name in SERVICES}}))
    wheels = directory / "wheels"
    wheels.mkdir()
    with torch_wheel_served(wheels) as links:
        engine.run_compose(
            *("--file", str(COMPOSE_FILE), "--file", str(override), "build"),
            seconds=1200,
            BASE_IMAGE=base,
            PIP_EXTRA_INDEX_URL="",
            PIP_FIND_LINKS=links,
        )
    return {"BASE_IMAGE": base, "NGINX_IMAGE": base, "PROMETHEUS_IMAGE": base, "ALERTMANAGER_IMAGE": base}


@contextmanager
def torch_wheel_served(directory: Path) -> Iterator[str]:
    """The address of a page that links the torch wheel which this machine's pip chooses.

    An image build then uses the same one: for the CPU alone, if that is what is set up here.
    """
    wanted = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert wanted is not None
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--python-version", "3.11"]
    subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(directory), wanted[0]], timeout=900, check=True
    )

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    handler = functools.partial(Handler, directory=str(directory))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
