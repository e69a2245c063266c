#!/usr/bin/env bash
# Runs a command with the site's variables and the project's environment: what every job script here does first.
#   slurm/with_site.sh mcore-swift inspect MODEL
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
site=${MCORE_SWIFT_SITE:-$root/slurm/site.env}
if [[ -f $site ]]; then
    set -a
    # shellcheck source=/dev/null
    source "$site"
    set +a
fi
venv=${MCORE_SWIFT_VENV:-$root/.venv}
if [[ ! -x $venv/bin/python ]]; then
    echo "$0: no Python in $venv: run 'make setup' in $root, or name the environment in $site (MCORE_SWIFT_VENV)" >&2
    exit 2
fi
export PATH=$venv/bin:$PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$@"
