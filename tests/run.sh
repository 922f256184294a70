#!/usr/bin/env bash
# The test suite: bash tests/run.sh [PYTEST ARGUMENTS], for instance -m "not slow" or a file.
# Files are tested two at a time, as most tests wait for processes that they start, and in the
# order of tests/conftest.py.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$root"
# What tests of offload to NVMe would else compile, minutes for which nothing is to be seen. A run that
# needs it compiles it as well, with a line that says so.
if printf '#include <libaio.h>\n' | "${CXX:-c++}" -E - >/dev/null 2>&1; then
  DS_ACCELERATOR=cpu phase "DeepSpeed's operator for offload to NVMe" python -c '
from ten_dist.engine.swap_folder import load_operator

load_operator()
'
fi
ruff check
ruff format --check
mypy ten_dist launch data_prep
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
