#!/usr/bin/env bash
# Install Chromium and axe-core, and run the tests of reports and of the site in the browser. From
# then on, scripts/test.sh runs them, too.
#
#     bash scripts/test_browser.sh
#
# Needs Debian or Ubuntu, and root for apt-get where chromium and chromedriver are missing. npm
# brings axe-core, into .venv/browser; without npm its tests are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment locked
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq chromium chromium-driver
fi
tools=$environment/browser
if command -v npm >/dev/null && [ ! -e "$tools/node_modules/axe-core/axe.min.js" ]; then
    npm install --silent --prefix "$tools" axe-core@4
fi
cd "$checkout"
exec "$python" -m pytest tests/report tests/docs -m browser "$@"
