"""Renew the generated parts of the README and of docs/, or say which are stale.

python -m docs.generate            write them
python -m docs.generate --check    write nothing; exit status 1 if one is stale
"""

from __future__ import annotations

import argparse
import sys

from docs.generate import configuration, file_map, preset_needs, results
from docs.generate.pages import COMMAND, ROOT

PAGES = {
    "README.md": results.page,
    "docs/configuration.md": configuration.page,
    "docs/architecture.md": file_map.page,
    "docs/planning.md": preset_needs.page,
}


def stale_pages() -> dict[str, str]:
    """The text that each stale page should have, by its name."""
    wanted = {name: page() for name, page in PAGES.items()}
    return {
        name: text
        for name, text in wanted.items()
        if not (ROOT / name).is_file() or (ROOT / name).read_text() != text
    }


def main() -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.generate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    check = parser.parse_args().check
    stale = stale_pages()
    for name, text in stale.items():
        if check:
            print(f"{name} is stale: {COMMAND} renews it")
        else:
            (ROOT / name).write_text(text)
            print(f"{name} is new")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
