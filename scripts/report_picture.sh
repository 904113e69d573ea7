#!/usr/bin/env bash
# Take a picture of a report, docs/images/report.png of the README, in headless Chromium.
#
#     bash scripts/demo.sh
#     bash scripts/report_picture.sh workspace/digits/report.html
set -euo pipefail
[ $# = 1 ] || { echo "expected one argument, the report of a run" >&2; exit 2; }
command -v chromium >/dev/null || { echo "missing: chromium; apt-get install chromium" >&2; exit 1; }
picture=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)/docs/images/report.png
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync \
    --disable-background-networking --disable-component-update --user-data-dir="$profile" \
    --hide-scrollbars --window-size=1280,1920 --virtual-time-budget=3000 \
    --screenshot="$picture" "file://$(realpath "$1")" 2>/dev/null
echo "wrote $picture"
