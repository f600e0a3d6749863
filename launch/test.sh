#!/usr/bin/env bash
# Run the tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_venv.sh

setup_venv "[test]"
choose_accelerator
exec .venv/bin/python -m pytest "$@"
