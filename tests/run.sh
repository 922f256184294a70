#!/usr/bin/env bash
# The test suite: bash tests/run.sh [PYTEST ARGUMENTS], for instance -m "not slow" or a file.
# Files are tested two at a time, as most tests wait for processes that they start, and in the
# order of tests/conftest.py.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$root"
ruff check
ruff format --check
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
