#!/usr/bin/env bash
# Builds what the project is measured beside. Safe to run again; PYTHON names the Python to use.
#
#     benchmarks/.venv-peers               the project (editable) and the frameworks, in one
#                                          environment, so that one process runs them side by side
#     benchmarks/.venv-robo-orchard-lab    RoboOrchardLab, which has the same import names
#     benchmarks/.venv-lerobot             the project (editable) and lerobot 0.4, whose requirements
#                                          exclude newer releases; its decoder needs FFmpeg's libraries
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
peers="$here/.venv-peers"
robo_orchard_lab="$here/.venv-robo-orchard-lab"
lerobot="$here/.venv-lerobot"

make() {
    if [ ! -x "$1/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$1" || {
            echo "peers.sh: python3 with the venv module is missing (Debian: apt-get install python3-venv)" >&2
            exit 1
        }
    fi
}

# One at a time: a peer that does not install leaves the others measurable, and the table says so.
install() {
    local venv=$1 peer=$2
    shift 2
    if "$venv/bin/python" -m pip install --quiet "$@"; then
        echo "peers.sh: $peer installed"
    else
        echo "peers.sh: $peer does NOT install here; its rows will say so" >&2
    fi
}

make "$peers"
"$peers/bin/python" -m pip install --quiet --editable "$here/..[metrics]"
for peer in lightning transformers pytorch-ignite mmengine; do
    install "$peers" "$peer" "$peer"
done
install "$peers" "digits and ResNet-18" torchvision scikit-learn
# Its limits exclude the newer releases that the others use. It runs with them.
install "$peers" Composer --no-deps mosaicml==0.32.1
install "$peers" "Composer's requirements" mosaicml-cli torch_optimizer coolname tabulate \
    py-cpuinfo requests "importlib-metadata<9"

# It imports Transformers, which it does not bring; 4 is of its time.
make "$robo_orchard_lab"
install "$robo_orchard_lab" RoboOrchardLab robo-orchard-lab==0.4.0 "transformers<5"

make "$lerobot"
install "$lerobot" lerobot --editable "$here/..[robotics]" lerobot==0.4.4
