#!/usr/bin/env bash
# Check kernels and trainer on this machine's GPU; see --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/job.sh"

find_python
exec "$python" "$root/launch/gpu_check.py" "$@"
