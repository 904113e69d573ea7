#!/usr/bin/env bash
# Build the site, docs/_build/html, without the network. The tutorials run, on the CPU. Warnings and
# broken inner links are errors. An unchanged tutorial runs again if the source code has changed.
#
#     bash scripts/docs.sh              in .venv, see scripts/environment.sh
#     bash scripts/docs.sh --clean      build every page again
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case "$*" in
    "" | --clean) ;;
    *) stop "expected no argument or --clean; got: $*" ;;
esac
python=${DOCS_PYTHON:-}
if [ -z "$python" ]; then make_environment locked; fi
cd "$checkout/docs"

# The pages show, run or import the code: all of them depend on it.
build=_build
inputs=$(cd .. && find src docs/conf.py docs/_extensions docs/_inventories pyproject.toml requirements \
    -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 cat | cksum)
if [ "$*" = --clean ] || [ "$(cat $build/built-from 2>/dev/null)" != "$inputs" ]; then
    rm -rf $build/source $build/html $build/doctrees $build/inventories
fi
# Sphinx writes pages next to their sources: it works on a copy.
mkdir -p $build/source
find $build/source -mindepth 1 -maxdepth 1 ! -name gallery ! -name project ! -name api -exec rm -r {} +
tar --create --exclude ./_build --exclude __pycache__ . | tar --extract --directory $build/source

TMPDIR=$(mktemp -d) # the tutorials leave files there
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
export PYTHONPATH=$checkout/src OMP_NUM_THREADS=1 MPLBACKEND=agg CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1
"$python" -m sphinx -b html -d $build/doctrees -j auto -W --keep-going -n -q $build/source $build/html
printf '%s' "$inputs" >$build/built-from
echo "docs/_build/html/index.html"
