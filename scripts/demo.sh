#!/usr/bin/env bash
# Create the environment and train a ResNet-18 on handwritten digits. Arguments are passed to the
# example, for instance --max_epoch 1 or --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
exec "$python" "$checkout/examples/digits/train.py" "$@"
