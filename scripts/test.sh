#!/usr/bin/env bash
# Checks everything, from nothing: makes the environment first. CI runs the same.
#
#     bash scripts/test.sh            style, types, spelling, tests with coverage
#     bash scripts/test.sh --all      the tests that take minutes, too
#
# Each check runs, also after another has failed. Exits with 0 if all passed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case "$*" in
    "") selection="not slow" ;;
    --all) selection="" ;;
    *) stop "expected no argument, or --all; got: $*" ;;
esac

make_environment
cd "$checkout"

failed=()
check() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}

check "ruff check" "$python" -m ruff check
check "ruff format" "$python" -m ruff format --check
check "mypy" "$python" -m mypy src tests examples benchmarks
check "codespell" "$environment/bin/codespell"
check "doctests" "$python" -m pytest src --doctest-modules --quiet --cov --cov-report=
check "tests" "$python" -m pytest tests -m "$selection" --cov --cov-append --cov-fail-under=95

if [ ${#failed[@]} -gt 0 ]; then
    stop "failed: ${failed[*]}"
fi
