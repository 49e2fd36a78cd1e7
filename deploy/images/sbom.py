"""What is in an image, as CycloneDX: `sbom.py IMAGE OUTPUT`, in the environment of requirements.txt.

cyclonedx-py lists the Python packages from their metadata; Debian's packages come from dpkg's list, and
Python itself, where the base has built it, from the variable that such bases set. The image is only read,
never run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import quote

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ENVIRONMENT = "/opt/sfllm/lib"
DPKG_STATUS = "/var/lib/dpkg/status"


@contextmanager
def container_of(image: str) -> Iterator[str]:
    """A container that is not started, to copy from."""
    container = _docker("create", image).strip()
    try:
        yield container
    finally:
        _docker("rm", container)


def _docker(*arguments: str) -> str:
    return subprocess.run(("docker", *arguments), stdout=subprocess.PIPE, text=True, check=True).stdout


@contextmanager
def _archive(container: str, path: str) -> Iterator[IO[bytes]]:
    command = ("docker", "cp", f"{container}:{path}", "-")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as copying:
        assert copying.stdout is not None
        yield copying.stdout
    if copying.returncode:
        raise subprocess.CalledProcessError(copying.returncode, command)


def copy_metadata(container: str, target: Path) -> None:
    """What the image's Python packages say about themselves, as folders of `target`."""
    with _archive(container, ENVIRONMENT) as stream, tarfile.open(fileobj=stream, mode="r|") as files:
        for file in files:
            folder = PurePosixPath(file.name).parent
            is_package = folder.name.endswith(".dist-info") and folder.parent.name == "site-packages"
            if file.isfile() and is_package:
                content = files.extractfile(file)
                assert content is not None
                (target / folder.name).mkdir(exist_ok=True)
                (target / folder.name / PurePosixPath(file.name).name).write_bytes(content.read())


def python_components(metadata: Path) -> dict[str, Any]:
    """A whole document about the packages whose metadata is there."""
    with tempfile.TemporaryDirectory() as directory:
        # cyclonedx-py asks an environment's Python where its packages are.
        answers = Path(directory, "python")
        answers.write_text(f"#!/bin/sh\necho '{json.dumps([str(metadata)])}'\n")
        answers.chmod(0o700)
        output = Path(directory, "sbom.json")
        command = [sys.executable, "-m", "cyclonedx_py", "environment", "--spec-version", "1.6"]
        command += ["--output-reproducible", "--output-file", str(output), str(answers)]
        subprocess.run(command, check=True)
        document: dict[str, Any] = json.loads(output.read_text())
        return document


def debian_components(container: str) -> list[dict[str, Any]]:
    """Debian's packages in the image, in the order of their names."""
    with _archive(container, DPKG_STATUS) as stream, tarfile.open(fileobj=stream, mode="r|") as files:
        status = files.next()
        content = status and files.extractfile(status)
        if not content:
            raise ValueError(f"{DPKG_STATUS} is not a file")
        text = content.read().decode()
    packages = [dict(_fields(paragraph)) for paragraph in text.split("\n\n") if paragraph.strip()]
    installed = [each for each in packages if each["Status"].endswith(" installed")]
    return [_debian_component(each) for each in sorted(installed, key=lambda each: each["Package"])]


def _fields(paragraph: str) -> Iterator[tuple[str, str]]:
    for line in paragraph.splitlines():
        name, separator, value = line.partition(":")
        if separator and not line.startswith(" "):
            yield name, value.strip()


def _debian_component(package: dict[str, str]) -> dict[str, Any]:
    name, version, architecture = package["Package"], package["Version"], package["Architecture"]
    purl = f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={architecture}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def image_component(image: str, configuration: dict[str, Any]) -> dict[str, Any]:
    """What the document is about, from the image's labels."""
    labels = {
        name.removeprefix("org.opencontainers.image."): value
        for name, value in (configuration["Labels"] or {}).items()
    }
    return {
        "type": "container",
        "bom-ref": "image",
        "name": labels.get("title", image),
        "version": labels.get("version", ""),
        "properties": [{"name": "sfllm:revision", "value": labels.get("revision", "")}],
    }


def interpreter_components(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    """Python where it is not a package of Debian's."""
    variables = dict(each.split("=", 1) for each in configuration["Env"] or [])
    if "PYTHON_VERSION" not in variables:
        return []
    version = variables["PYTHON_VERSION"]
    purl = f"pkg:generic/python@{version}"
    return [{"type": "application", "bom-ref": purl, "name": "python", "version": version, "purl": purl}]


def sbom(image: str) -> dict[str, Any]:
    """The document. Raises `CalledProcessError` where there is no such image."""
    configuration = json.loads(_docker("image", "inspect", "--format", "{{json .Config}}", image))
    with tempfile.TemporaryDirectory() as directory, container_of(image) as container:
        metadata = Path(directory)
        copy_metadata(container, metadata)
        document = python_components(metadata)
        document["components"] += interpreter_components(configuration) + debian_components(container)
    document["metadata"]["component"] = image_component(image, configuration)
    return document


def validate(text: str) -> None:
    """Hold the document against CycloneDX' own schema. Raises `ValueError`."""
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        raise ValueError(f"not a CycloneDX document: {error}")


def main() -> None:
    """Write one image's document."""
    image, output = sys.argv[1], Path(sys.argv[2])
    text = json.dumps(sbom(image), indent=2, sort_keys=True) + os.linesep
    validate(text)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(output)


if __name__ == "__main__":
    main()
