"""Token shards of some hundreds of megabytes of public text, for benchmarks.quality ladder.

    python -m benchmarks.ladder_corpus DIR

The text is that of Debian packages: the source of Linux with its documentation, and the
documentation of Python and git. They are fetched by apt-get, without being root and without
installing anything, text files are picked from them, and data_prep.shard makes shards of
4,096 tokens of vocabulary of these, in DIR/shards. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ten_dist.errors import ConfigurationError

LINUX = "linux-source"
"""Depends on the source of the distribution's kernel, whatever its version."""
DOCUMENTATION = ("python3-doc", "git-doc")
SUFFIXES = (".c", ".h", ".py", ".rst", ".sh", ".txt")
# Drivers are most of the source, and much of them is generated tables of registers.
FOLDERS = re.compile(
    r"linux-source[^/]*/(Documentation|arch/x86|block|crypto|drivers/net|fs|include|init|ipc"
    r"|kernel|lib|mm|net|scripts|security|sound|tools)/"
)
VOCABULARY = 4096
HELD_OUT = 0.01


def main() -> int:
    """Make the corpus; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    try:
        if not (folder / "text").is_dir():
            _pick(_packages(folder / "packages"), folder)
        _shard(folder / "text", folder / "shards")
    except (ConfigurationError, OSError, tarfile.TarError) as error:
        print(f"benchmarks.ladder_corpus: {error}", file=sys.stderr)
        return 2
    print(f"{folder / 'shards'} is ready for: python -m benchmarks.quality ladder")
    return 0


def _packages(folder: Path) -> list[Path]:
    """Files of the packages, fetched where they are not there.

    Raises:
        ConfigurationError: there is no apt-get, or it does not find or fetch one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in (LINUX, *DOCUMENTATION):
        package = _dependency(name)
        files = sorted(folder.glob(f"{package}_*.deb"))
        if not files:
            print(f"fetching {package}", flush=True)
            _call(["apt-get", "download", package], cwd=folder)
            files = sorted(folder.glob(f"{package}_*.deb"))
        found.append(files[-1])
    return found


def _dependency(name: str) -> str:
    """The package of a version that one without a version stands for, or `name` itself."""
    lines = _call(["apt-cache", "depends", name]).splitlines()
    versioned = re.compile(rf"\s*Depends: ({name.replace('3-', '3[.0-9]*-')}[-.0-9]*)$")
    matches = filter(None, map(versioned.match, lines))
    return next((match[1] for match in matches), name)


def _call(command: list[str], cwd: Path | None = None) -> str:
    """What a command prints.

    Raises:
        ConfigurationError: it is not there, or fails.
    """
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise ConfigurationError(
            f"{command[0]} is not there: this needs a machine with Debian or Ubuntu"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it says nothing"]
        raise ConfigurationError(f"`{' '.join(command)}` fails: {lines[-1]}")
    return done.stdout


def _pick(packages: list[Path], folder: Path) -> None:
    """Write the text files of the packages into `text`, which is complete or absent."""
    unfinished = folder / "text.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    files, size = 0, 0
    for package in packages:
        print(f"picking text from {package.name}", flush=True)
        for name, content in _text_files(package):
            path = unfinished / package.name.partition("_")[0] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
            files, size = files + 1, size + path.stat().st_size
    unfinished.rename(folder / "text")
    print(f"picked {files:,} files, {size / 1e6:,.0f} MB", flush=True)


def _text_files(package: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Paths and contents of what is text in a package, one after the other."""
    with (
        subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE
        ) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if re.fullmatch(r".*/linux-source[^/]*\.tar\.xz", member.name):
                with tarfile.open(
                    fileobj=archive.extractfile(member), mode="r|xz"
                ) as source:
                    for inner in source:
                        if FOLDERS.match(inner.name) and _is_text(inner):
                            yield inner.name, _opened(source, inner)
            elif _is_text(member):
                yield member.name, _opened(archive, member)


def _is_text(member: tarfile.TarInfo) -> bool:
    return member.isfile() and member.name.endswith(SUFFIXES)


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None, "it is a file"
    return content


def _shard(text: Path, shards: Path) -> None:
    """Make shards where there is no manifest of them.

    Raises:
        ConfigurationError: data_prep.shard fails; it has said why.
    """
    if (shards / "manifest.json").is_file():
        return
    command = [sys.executable, "-m", "data_prep.shard", "--input", str(text)]
    command += ["--include", "*", "--output", str(shards), "--deduplicate"]
    command += ["--vocab_size", str(VOCABULARY), "--val_fraction", str(HELD_OUT)]
    if subprocess.run(command, check=False).returncode:
        raise ConfigurationError(f"shards of {text} could not be made")


if __name__ == "__main__":
    sys.exit(main())
