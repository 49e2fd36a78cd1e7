"""Runs inside an image's build, at the end of each step: leaves the same files whenever it is built.

`finish.py ENVIRONMENT` compiles what the step installed, removes what only installing needs, and gives
every file the time of SOURCE_DATE_EPOCH. With `--root ROOT` it also makes, below ROOT, what an image adds to
its base besides: the user, folders that every user may write to (`--writable`) and folders for its own user
alone (`--private`). A named volume takes over the mode and the owner of the folder that it covers.
"""

from __future__ import annotations

import argparse
import os
import py_compile
import shutil
from importlib.util import cache_from_source
from pathlib import Path

UID = 10001
NAME = "sfllm"


def compile_new(environment: Path) -> None:
    """Bytecode beside every source that has none yet, since a read-only image cannot write it later.

    It names its source's hash, not its time: the same in every build, and a source that is mounted over
    another one counts.
    """
    for source in sorted(environment.rglob("*.py")):
        if Path(cache_from_source(str(source))).exists():
            continue
        try:
            py_compile.compile(
                str(source), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
            )
        except py_compile.PyCompileError as error:  # templates that packages carry, which nobody imports
            print(f"not compiled: {error.msg.strip().splitlines()[-1]}: {source}")


def remove_commands(environment: Path) -> None:
    """Only python stays: scripts of packages serve shells, which these images are not for."""
    for command in sorted((environment / "bin").iterdir()):
        if not command.name.startswith("python"):
            command.unlink()


def make_user(etc: Path, home: Path) -> None:
    """The base's users and one more, who has no password, shell or home that is written to."""
    etc.mkdir(parents=True)
    lines = {
        "passwd": f"{NAME}:x:{UID}:{UID}:{NAME}:{home}:/usr/sbin/nologin\n",
        "group": f"{NAME}:x:{UID}:\n",
    }
    for name, line in lines.items():
        shutil.copyfile(Path("/etc") / name, etc / name)
        with (etc / name).open("a") as file:
            file.write(line)


def make_folder(folder: Path, mode: int, owner: int) -> None:
    """An empty folder. `mkdir` would apply the mask of the process."""
    folder.mkdir(parents=True)
    folder.chmod(mode)
    os.chown(folder, owner, owner)


def set_times(root: Path, seconds: int) -> None:
    """Let every file below `root` that a step has touched be as old as the others."""
    for path in (root, *root.rglob("*")):
        if path.lstat().st_mtime != seconds:
            os.utime(path, (seconds, seconds), follow_symlinks=False)


def main() -> None:
    """Do what the module says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--writable", type=Path, nargs="*", default=[])
    parser.add_argument("--private", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    seconds = int(os.environ["SOURCE_DATE_EPOCH"])
    compile_new(arguments.environment)
    remove_commands(arguments.environment)
    set_times(arguments.environment, seconds)
    if arguments.root is None:
        return
    make_user(arguments.root / "etc", Path("/nonexistent"))
    for folder in arguments.writable:
        make_folder(arguments.root / folder.relative_to("/"), mode=0o1777, owner=0)
    for folder in arguments.private:
        make_folder(arguments.root / folder.relative_to("/"), mode=0o700, owner=UID)
    set_times(arguments.root, seconds)


if __name__ == "__main__":
    main()
