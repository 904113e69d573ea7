#!/usr/bin/env bash
# Trains a ResNet-18 on handwritten digits, from nothing: makes the environment first. Arguments go
# on to the example, for instance --max_epoch 1 or --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
exec "$python" "$checkout/examples/digits/train.py" "$@"
