# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes .venv, installs torch first, then the project; does nothing twice.
#
#   setup_venv EXTRAS     for example [train]
#
# Torch comes first and pinned, because any other package would pull its newest build and the CUDA packages with it.

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

# DeepSpeed warns at each start that it sees no GPU, unless it is told.
choose_accelerator() {
  export DS_ACCELERATOR=${DS_ACCELERATOR:-$(.venv/bin/python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
}
