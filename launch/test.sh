#!/usr/bin/env bash
# Run the tests: bash launch/test.sh [--full] [pytest arguments]
#
# The main tests; with --full all tests, which take about half an hour on 2 idle cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_venv.sh

selection="not full and not chaos"
if [ "${1:-}" = --full ]; then
  selection="not chaos"
  shift
fi
setup_venv "[test]"
choose_accelerator
# Two files at a time: most tests wait for processes to start, and tests of one file share costly fixtures.
# The caller's arguments come last and override these.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$selection" "$@"
