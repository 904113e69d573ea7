#!/usr/bin/env bash
# Create the environment, collect 50 demonstrations in a simulator, train a policy on them, and report
# its success rate. Arguments are passed to the training, for instance --trainer.max_step 400.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
cd "$checkout/examples/metaworld"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # in small models, threads cost more than they gain
[ -e data/pick-place-v3 ] || "$python" collect.py
"$python" -m robo_orchard_lab train pick_place.yaml --trust pick_place "$@"
"$python" -m robo_orchard_lab rollout runs/pick_place --trust pick_place --episodes 20
