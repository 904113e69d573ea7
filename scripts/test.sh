#!/usr/bin/env bash
# Check everything. Make the environment first. CI runs the same.
#
#     bash scripts/test.sh              style, types, spelling, the site, tests with coverage
#     bash scripts/test.sh --all        also the tests that take minutes; torchrun starts all ranks
#     bash scripts/test.sh --newest     only the tests, on the newest releases of all packages
#     bash scripts/test.sh --oldest     only the tests, on the lowest releases that pyproject.toml accepts
#
# The tests run on all cores; PYTEST_XDIST_AUTO_NUM_WORKERS sets the number of workers. Each
# check runs, also after another has failed. Exits with 0 if all passed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

selection="not slow"
versions=locked
case "$*" in
    "") ;;
    --all) selection="" TEST_LAUNCHER=torchrun ;;
    --newest | --oldest) versions=${1#--} ;;
    *) stop "expected no argument, --all, --newest or --oldest; got: $*" ;;
esac

make_environment "$versions"
cd "$checkout"

failed=()
check() {
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
    printf '== %s: %d s\n' "$name" $((SECONDS - began))
}

# Three workers for two cores: many tests wait for processes.
export PYTEST_XDIST_AUTO_NUM_WORKERS=${PYTEST_XDIST_AUTO_NUM_WORKERS:-$((($(nproc) * 3 + 1) / 2))}
export TEST_LAUNCHER=${TEST_LAUNCHER:-fork}
export OMP_NUM_THREADS=1 # a core for each worker
parallel=(-n auto --dist worksteal)

# These read the site, which is built with the locked versions only, or compare what pages print.
site=(--ignore tests/docs/test_reference.py --ignore tests/docs/test_site.py)
site+=(--ignore tests/docs/test_pages.py)

# These measure time: they run alone, after the other tests.
alone=(tests/end_to_end/test_benchmarks.py tests/pipeline/hooks/test_stats_monitor.py)

if [ "$versions" = locked ]; then
    check "ruff check" "$python" -m ruff check
    check "ruff format" "$python" -m ruff format --check
    check "mypy" "$python" -m mypy src tests examples benchmarks
    check "codespell" "$environment/bin/codespell"
    check "docs" bash scripts/docs.sh
    check "doctests" "$python" -m pytest src --doctest-modules --quiet --cov --cov-report=
    check "tests" "$python" -m pytest tests "${parallel[@]}" "${alone[@]/#/--ignore=}" -m "$selection" \
        --cov --cov-append --cov-report=
    check "tests of speed, and coverage" "$python" -m pytest "${alone[@]}" -m "$selection" \
        --cov --cov-append --cov-fail-under=95
else
    "$python" -m pip list --disable-pip-version-check
    check "doctests" "$python" -m pytest src --doctest-modules --quiet
    check "tests" "$python" -m pytest tests "${parallel[@]}" "${site[@]}" -m "$selection"
fi

if [ ${#failed[@]} -gt 0 ]; then
    stop "failed: ${failed[*]}"
fi
