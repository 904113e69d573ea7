#!/usr/bin/env bash
# Refresh the versions that the other scripts install.
#
#     bash scripts/lock.sh                  newest releases; torch stays at its locked release
#     bash scripts/lock.sh --torch 2.14.0   newest releases, with this release of torch
#
# Writes two files of constraints for pip on Linux:
#
#     requirements/locked.txt   newest releases that install on Python 3.11, 3.12 and 3.13
#     requirements/oldest.txt   lowest releases that pyproject.toml accepts, with newest test tools;
#                               for Python 3.11
#
# The lock pins a release of torch, not a build of it. A wheel of any build satisfies the pin, such
# as a CPU wheel in a folder that PIP_FIND_LINKS names. Only --torch changes that release.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

cd "$checkout"
locked=requirements/locked.txt
oldest=requirements/oldest.txt

case "$#:${1-}" in
    0:) torch=$(sed -n 's/^torch==//p' "$locked") ;;
    2:--torch) torch=$2 ;;
    *) stop "expected no argument, or --torch RELEASE; got: $*" ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
find_system_python
"$system_python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --disable-pip-version-check --quiet uv

# uv reads the platforms of a universal resolution from the project file: resolve a copy.
cp pyproject.toml "$work"
cat >>"$work/pyproject.toml" <<'END'
[tool.uv]
environments = ["sys_platform == 'linux' and python_version < '3.14'"]
END

# Resolve the project's requirements. Arguments go to `uv pip compile`.
resolve() {
    "$work/venv/bin/uv" --directory "$work" pip compile pyproject.toml --quiet \
        --python-version 3.11 --no-header --no-annotate --extra vision --extra metaworld \
        --extra viewer --extra onnx --extra search --extra cluster --extra docs "$@"
}

# Write the resolution $1 to the constraints file $2. A constraint holds only for a package that
# something requires: keep markers only where they select one of two pins.
write() {
    printf '%s\n' "# Written by \`bash scripts/lock.sh\`; do not edit." >"$2"
    awk -F ' *(==|;)' 'NR == FNR { count[$1]++; next } count[$1] == 1 { sub(/ *;.*/, "") } { print }' \
        "$1" "$1" >>"$2"
}

printf 'torch==%s\n' "$torch" >"$work/torch.txt"
resolve --extra dev --extra interchange --universal --fork-strategy fewest --constraint torch.txt >"$work/locked.txt"
resolve --python-platform linux --resolution lowest-direct >"$work/lowest.txt"
resolve --python-platform linux --extra dev --constraint lowest.txt >"$work/oldest.txt"
write "$work/locked.txt" "$locked"
write "$work/oldest.txt" "$oldest"
printf 'wrote %s and %s: review the changes, then run bash scripts/test.sh\n' "$locked" "$oldest"
