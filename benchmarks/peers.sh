#!/usr/bin/env bash
# Builds benchmarks/.venv-peers: the project (editable) and the frameworks it is measured beside,
# in one environment, so that one process can run them side by side. Safe to run again.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$here/.venv-peers"

if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv" || {
        echo "peers.sh: python3 with the venv module is missing (Debian: apt-get install python3-venv)" >&2
        exit 1
    }
fi
"$venv/bin/python" -m pip install --quiet --editable "$here/.."

# One at a time: a peer that does not install leaves the others measurable, and the table says so.
for peer in lightning transformers pytorch-ignite mmengine; do
    if "$venv/bin/python" -m pip install --quiet "$peer"; then
        echo "peers.sh: $peer installed"
    else
        echo "peers.sh: $peer does NOT install here; its rows will say so" >&2
    fi
done
