#!/usr/bin/env bash
# The environment of every script of this checkout: a virtual environment in .venv with the
# versions of constraints.txt. Run it to set up and nothing else; scripts source it, and then have
#   $root               the checkout
#   $gpus               after count_gpus: how many GPUs torch can use
#   "${mpi_launch[@]}"  the start of an `mpiexec -n N PROGRAM` command
# PYTHON=/path/to/python chooses the interpreter. pip's own settings (PIP_EXTRA_INDEX_URL and so on)
# choose where packages come from, for instance a build of torch for this machine's GPUs or for none.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
# Operators live and die with the torch that they were compiled for.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}

say() { printf 'environment: %s\n' "$*" >&2; }

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Prints an interpreter, or nothing. An environment that works keeps the one that it was made with,
# so that a new python3 on PATH does not cause a new installation.
find_python() {
  local candidate path
  if [ -z "${PYTHON:-}" ] && is_new_enough "$venv/bin/python"; then
    printf '%s\n' "$venv/bin/python"
    return
  fi
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
    # With the environment activated, python3 is the very interpreter that may be about to be replaced.
    path=$(PATH=${PATH//"$venv/bin:"/} command -v "$candidate") || path=
    if [ -n "$path" ] && is_new_enough "$path"; then
      printf '%s\n' "$path"
      return
    fi
    [ -z "${PYTHON:-}" ] || return 0
  done
}

# Prints a compiler that can build the operators, or nothing.
find_compiler() {
  local candidate version
  for candidate in ${CXX:+"$CXX"} c++ g++ clang++; do
    version=$("$candidate" --version 2>/dev/null) || continue
    case $version in
      *clang*) ;;
      *) [ "$("$candidate" -dumpversion | cut -d. -f1)" -ge 9 ] || continue ;;
    esac
    printf '%s\n' "$candidate"
    return
  done
}

# Everything that is missing is named at once: finding out one by one costs a run each.
check_machine() {
  local missing=() debian=() fedora=() compiler lacks found
  python=$(find_python)
  if [ -z "$python" ]; then
    if [ -n "${PYTHON:-}" ]; then
      missing+=("Python >= 3.10: PYTHON=$PYTHON is not one")
    else
      found=$(python3 --version 2>/dev/null) || found="not on PATH"
      missing+=("Python >= 3.10: python3 is $found (another one: PYTHON=/path/to/python)")
    fi
    debian+=(python3 python3-venv python3-dev)
    fedora+=(python3 python3-devel)
  else
    lacks=$("$python" - <<'PYTHON'
import importlib.util
import os
import sysconfig

if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
    print("venv")
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    print("headers")
PYTHON
    )
    case $lacks in
      *venv*)
        missing+=("Python's venv module: $python comes without it")
        debian+=(python3-venv)
        fedora+=(python3-libs)
        ;;
    esac
    case $lacks in
      *headers*)
        missing+=("Python's C headers (Python.h): $python comes without them")
        debian+=(python3-dev)
        fedora+=(python3-devel)
        ;;
    esac
  fi
  if ! command -v git >/dev/null; then
    missing+=("git")
    debian+=(git)
    fedora+=(git)
  fi
  compiler=$(find_compiler)
  if [ -z "$compiler" ]; then
    missing+=("a C++ compiler: g++ >= 9 or clang++ (another one: CXX=/path/to/compiler)")
    debian+=(g++)
    fedora+=(gcc-c++)
  elif [ "$compiler" != c++ ]; then
    # torch calls c++ where CXX is not set.
    export CXX=$compiler
  fi
  if [ ${#missing[@]} -gt 0 ]; then
    say "this machine lacks:"
    printf '  - %s\n' "${missing[@]}" >&2
    printf 'Debian, Ubuntu:  apt-get install %s\n' "${debian[*]}" >&2
    printf 'Fedora, RHEL:    dnf install %s\n' "${fedora[*]}" >&2
    exit 2
  fi
}

# Whatever changes what has to be installed. An editable installation knows the packages by name,
# so that a new one at the top level counts as well.
fingerprint() {
  {
    printf '%s\n' "$root"
    "$python" -VV
    cd "$root"
    ls -d ./*/__init__.py
    cat setup.cfg pyproject.toml constraints.txt
  } | git hash-object --stdin
}

# phase WHAT COMMAND...: one line with its seconds; the output goes to the log.
phase() {
  local what=$1 start=$SECONDS status=0
  shift
  printf 'environment: %s ... ' "$what" >&2
  printf '\n# %s: %s\n' "$what" "$*" >>"$venv/install.log"
  "$@" >>"$venv/install.log" 2>&1 </dev/null || status=$?
  if [ "$status" -ne 0 ]; then
    printf 'failed with status %s\n' "$status" >&2
    tail -n 20 "$venv/install.log" >&2
    say "the whole log is $venv/install.log; the same command again starts over"
    exit "$status"
  fi
  printf '%s s\n' "$((SECONDS - start))" >&2
}

pip_install() {
  phase "$1" "$venv/bin/python" -m pip --disable-pip-version-check --no-input install \
    --constraint "$root/constraints.txt" "${@:2}"
}

install_packages() {
  # A package whose installation was cut off cannot be told from a whole one: begin again.
  # An environment without the mark is complete, or the user's own and theirs to keep.
  if [ -e "$venv/unfinished" ] || ! is_new_enough "$venv/bin/python" ||
    [ "$("$venv/bin/python" -VV)" != "$("$python" -VV)" ] ||
    { [ -e "$venv/made_for" ] && [ "$(cat "$venv/made_for")" != "$root" ]; }; then
    [ ! -e "$venv" ] || say "making .venv anew: it is unfinished, moved, or for another Python"
    if [ "$python" = "$venv/bin/python" ]; then
      # It is about to be deleted; the interpreter behind it makes its successor.
      python=$("$python" -c 'import sys; print(sys._base_executable)')
    fi
    rm -rf "$venv"
    mkdir "$venv"
    touch "$venv/unfinished"
    phase "virtual environment of $("$python" --version)" "$python" -m venv "$venv"
    printf '%s\n' "$root" >"$venv/made_for"
  fi
  touch "$venv/unfinished"
  # torch first and by itself: the largest part, and whichever build of it pip is set to find. The
  # rest is built with the pinned setuptools instead of whatever is newest on the day.
  pip_install "torch, the largest part" torch setuptools
  # DeepSpeed's installation asks every operator of the accelerator whether it could be built, and
  # on a machine with a GPU but without a CUDA compiler that question fails.
  DS_ACCELERATOR=cpu pip_install "DeepSpeed, mpi4py, webdataset and the others" \
    --no-build-isolation --editable "${root}[dev,mpi]"
  # So that TORCH_EXTENSIONS_DIR holds however this environment's Python is started.
  printf '%s\n' 'import os, sys; os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))' \
    >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/ten_dist_environment.pth"
  fingerprint >"$venv/installed"
  rm "$venv/unfinished"
}

# torch takes seconds to import, so it is asked only where there is something to find.
count_gpus() {
  gpus=0
  if command -v nvidia-smi >/dev/null || [ -e /dev/kfd ]; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" -eq 0 ]; then
      say "torch sees no GPU: this goes on with the CPU (python -c 'import torch; torch.cuda.init()' says why)"
    fi
  fi
}

# A minute of compilation inside the first run of a user, on all ranks, looks like a hang. Where it
# is not possible, training says so and goes on without it. The mark is of this checkout: others may
# share the folder.
build_operators() {
  phase "compiling operators for this processor, once" python -c '
from ten_dist import native

print(native.unavailable() or "compiled")
'
  cp "$venv/installed" "$venv/built"
}

is_current() { [ -e "$1" ] && [ "$(cat "$1")" = "$(fingerprint)" ]; }

is_ready() {
  [ ! -e "$venv/unfinished" ] && is_current "$venv/installed" && is_current "$venv/built"
}

set_up() {
  local start=$SECONDS
  trap 'printf "\n" >&2; say "interrupted; the same command again starts over"; exit 130' INT TERM
  say "setting up $venv (log: $venv/install.log)"
  if [ -e "$venv/unfinished" ] || ! is_current "$venv/installed"; then
    install_packages
  fi
  activate
  is_current "$venv/built" || build_operators
  say "ready after $((SECONDS - start)) s"
  trap - INT TERM
}

activate() {
  export VIRTUAL_ENV=$venv PATH=$venv/bin:${PATH//"$venv/bin:"/}
  unset PYTHONHOME
  hash -r
}

check_machine
if ! is_ready; then
  if ! { : >>"$root/.venv.lock"; } 2>/dev/null; then
    say "cannot write to $root, where the environment goes"
    exit 2
  fi
  if command -v flock >/dev/null; then
    exec 9>>"$root/.venv.lock"
    if ! flock -n 9; then
      say "another set-up of this checkout is under way; waiting for it"
      flock 9
      # The interpreter that was found may be one that the other has replaced.
      check_machine
    fi
  fi
  is_ready || set_up
  exec 9>&-
fi
activate

# More ranks than cores, and root in a container, are ordinary here; Open MPI refuses both unless told.
mpi_launch=(mpiexec --bind-to none --oversubscribe)
if [ "$(id -u)" -eq 0 ]; then
  mpi_launch+=(--allow-run-as-root)
fi

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  say "ready; 'source .venv/bin/activate' in $root enters it"
fi
