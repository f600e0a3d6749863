#!/usr/bin/env bash
# Run the tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_venv.sh

setup_venv "[test]"
choose_accelerator
# Two at a time: most tests wait for processes that start. A -n of your own comes after, and counts.
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
