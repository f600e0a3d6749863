#!/usr/bin/env bash
# Distil on the 8 V100s of this host; see --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/job.sh"

usage="bash launch/v100x8.sh --teacher ID_OR_DIR --data_dir DIR --output_dir DIR [further arguments of launch/train.py]
    distils on 8 GPUs of this host with ds_configs/v100x8_fp16.json: 4096 rows per step, fp16
    Run the same command again to resume a stopped run.
    Environment: NUM_GPUS=N for another number of GPUs, CUDA_VISIBLE_DEVICES, MASTER_PORT, PYTHON"

[ $# -gt 0 ] || { echo "$usage" >&2 && exit 2; }
case $1 in --help | -h) echo "$usage" && exit 0 ;; esac

gpus=${NUM_GPUS:-8}
[[ $gpus =~ ^[1-9][0-9]{0,2}$ ]] || fail "NUM_GPUS is '$gpus'; it must be a whole number from 1 to 999"
[ -z "${MASTER_PORT:-}" ] || check_port MASTER_PORT "$MASTER_PORT"
find_python

# Checked here, because torch reports a GPU that it has no code for only at the first kernel.
[ "${DS_ACCELERATOR:-}" = cpu ] || "$python" - "$gpus" <<'PYTHON'
import sys

import torch


def has_code_for(major, minor):
    """Machine code of the same generation, or portable code (PTX) of this or an older one."""
    for name in torch.cuda.get_arch_list():
        kind, _, digits = name.partition("_")
        digits = "".join(filter(str.isdigit, digits))
        built = int(digits[:-1]), int(digits[-1])
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


wanted, found = int(sys.argv[1]), torch.cuda.device_count()
if found < wanted:
    fail(f"{wanted} GPUs are needed and torch finds {found}; set NUM_GPUS to another number")
for index in range(wanted):
    major, minor = torch.cuda.get_device_capability(index)
    if not has_code_for(major, minor):
        fail(
            f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(index)} (sm_{major}{minor}); "
            "install a build that has it; for V100: pip install -c constraints-v100.txt torch"
        )
PYTHON

# The first visible GPUs; DeepSpeed's own --num_gpus takes GPUs 0, 1, ... even if they are not visible.
devices=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}
devices=$(cut -d, -f"1-$gpus" <<<"$devices")
port=${MASTER_PORT:-$("$python" -c '
import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(probe.getsockname()[1])')}

# Not `deepspeed`, which on SIGTERM ends and leaves the ranks training: the launcher below it ends them.
exec "$python" -u -m deepspeed.launcher.launch --log_level=error \
  --world_info="$(encode_world_info "{\"localhost\": [\"${devices//,/\", \"}\"]}")" \
  --master_addr=127.0.0.1 --master_port="$port" "${recipe[@]}" "$@"
