# shellcheck shell=bash
# Sourced by quickstart.sh, test.sh and .ci/run: makes .venv and installs torch, then the project, unless that is done.
#
#   setup_venv EXTRAS     for example [train]
#
# Torch is installed first and pinned: otherwise another package would pull its newest build with the CUDA packages.

TORCH=torch==2.13.0

setup_venv() {
  local extras=$1 python=${PYTHON:-python3} stamp wanted
  stamp=.venv/installed$extras
  wanted="$TORCH $(cksum setup.py)"
  [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return 0
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3" >&2
    return 2
  }
  echo "installing into .venv (once; several minutes)" >&2
  [ -x .venv/bin/python ] || "$python" -m venv .venv || {
    echo "error: cannot make .venv; install Python's venv module (Debian: python3-venv) and remove .venv" >&2
    return 2
  }
  { .venv/bin/python -m pip install --quiet "$TORCH" && .venv/bin/python -m pip install --quiet --editable ".$extras"; } || {
    echo "error: installing failed, see above; correct it and run this again" >&2
    return 2
  }
  echo "$wanted" >"$stamp"
}

# Without DS_ACCELERATOR, DeepSpeed warns about a missing GPU at each start.
choose_accelerator() {
  export DS_ACCELERATOR=${DS_ACCELERATOR:-$(.venv/bin/python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
}
