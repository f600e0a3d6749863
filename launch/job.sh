# shellcheck shell=bash
# Sourced by the scripts of this folder that need the project installed. They set root, the project's folder.

fail() {
  echo "error: ${1//[[:cntrl:]]/ }" >&2
  exit 2
}

check_port() {
  [[ $2 =~ ^[1-9][0-9]{0,4}$ && $2 -le 65535 ]] || fail "$1 is '$2'; it must be a port, from 1 to 65535"
}

# The training command of v100x8.sh, multi_node.sh and slurm.sbatch: 4096 rows per step in fp16 with dynamic loss
# scaling; a job that is started again resumes. The caller's arguments come later, so that their --deepspeed_config wins.
# shellcheck disable=SC2034,SC2154
recipe=("$root/launch/train.py" --deepspeed_config "$root/ds_configs/v100x8_fp16.json" --resume)

# Sets python to $PYTHON, if set, else to the first of PATH's and .venv's Python that has the project installed.
find_python() {
  local candidate candidates=(python "$root/.venv/bin/python")
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    # -P: without the current folder, which holds the package when this is a checkout.
    # shellcheck disable=SC2034
    python=$("$candidate" -P -c 'import importlib.util, sys
importlib.util.find_spec("distilspeed.trainer") or sys.exit(1)
print(sys.executable)' 2>/dev/null) && return
  done
  fail "distilspeed is not installed for ${candidates[0]}; activate its environment, or name it with PYTHON=/path/to/python"
}

# Encodes --world_info of DeepSpeed's launch.py: {"host": [GPU, ...], ...} in URL-safe base64.
encode_world_info() {
  printf '%s' "$1" | base64 -w0 | tr '+/' '-_'
}
