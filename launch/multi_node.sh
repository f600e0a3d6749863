#!/usr/bin/env bash
# Distil on many hosts, started over ssh from one of them; see --help.
#
# This replaces `deepspeed --hostfile` with pdsh, which has four faults: Ctrl-C ends every DeepSpeed job on the hosts
# with a similar command line (pkill -f); arguments with quotes or spaces break; the environment is passed only through
# a file; and a host that fails leaves the others waiting.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/job.sh"

usage="bash launch/multi_node.sh --hostfile FILE [--master_addr ADDRESS] [--master_port 29500]
       --teacher ID_OR_DIR --data_dir DIR --output_dir DIR [further arguments of launch/train.py]
    distils on all GPUs of the hosts in FILE (lines 'NAME slots=GPUS', as DeepSpeed reads them) with
    ds_configs/v100x8_fp16.json: 4096 rows per step, fp16
    Project, Python, data and output have the same paths on every host; ssh needs no password.
    Run the same command again to resume a stopped run.
    --master_addr   the first host's address for the others; default: the first that its hostname -I prints
    Environment: SSH_COMMAND (default ssh), PYTHON. Variables of CUDA, DeepSpeed, Hugging Face, gloo, NCCL, OpenMP,
    Python, torch, Triton and W&B are passed to the hosts, and the lines of .deepspeed_env here and in the home folder"

hostfile='' address='' port=29500 arguments=()
[ $# -gt 0 ] || { echo "$usage" >&2 && exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) echo "$usage" && exit 0 ;;
    --hostfile | --master_addr | --master_port)
      [ $# -ge 2 ] || fail "$1 needs a value; see bash launch/multi_node.sh --help"
      case $1 in
        --hostfile) hostfile=$2 ;;
        --master_addr) address=$2 ;;
        --master_port) port=$2 ;;
      esac
      shift 2
      ;;
    *) arguments+=("$1") && shift ;;
  esac
done
[ -n "$hostfile" ] || fail "--hostfile is needed; see bash launch/multi_node.sh --help"
{ [ -r "$hostfile" ] && [ ! -d "$hostfile" ]; } || fail "cannot read the hostfile $hostfile; it has a line 'NAME slots=GPUS' for each host"
check_port --master_port "$port"

hosts=() world=''
while read -r name slots _ || [ -n "$name" ]; do
  [[ $name != '' && $name != \#* ]] || continue
  [[ $name =~ ^[[:alnum:]][[:alnum:]_.:@%-]*$ && $slots =~ ^slots=[1-9][0-9]{0,2}$ ]] ||
    fail "the hostfile $hostfile has the line '$name $slots'; it must be 'NAME slots=GPUS'"
  [[ " ${hosts[*]} " != *" $name "* ]] || fail "the hostfile $hostfile names $name twice; give it one line"
  hosts+=("$name")
  world+="${world:+, }\"$name\": [$(seq -s, 0 $((${slots#slots=} - 1)))]"
done <"$hostfile"
[ ${#hosts[@]} -gt 0 ] || fail "the hostfile $hostfile names no host; it has a line 'NAME slots=GPUS' for each"
find_python

# ssh notices an unreachable host after two minutes; by default it never does.
read -ra ssh <<<"${SSH_COMMAND:-ssh}"
ssh+=(-T -o BatchMode=yes -o ServerAliveInterval=30 -o ServerAliveCountMax=4)
if [ -z "$address" ]; then
  read -r address _ < <("${ssh[@]}" "${hosts[0]}" hostname -I </dev/null) ||
    fail "cannot get the address of ${hosts[0]} over ssh; see above, or give --master_addr"
fi

# Prints the environment as export commands. They go to the hosts on ssh's standard input, because other users of a
# host could read tokens in a command line.
carried_environment() {
  local name line file
  for name in $(compgen -e); do
    case $name in
      CUDA_VISIBLE_DEVICES) ;; # the launcher gives each host its own
      CUDA_* | DS_ACCELERATOR | GLOO_* | HF_* | KMP_* | MKL_* | NCCL_* | OMP_* | PYTHON* | TOKENIZERS_* | TORCH_* | \
        TRITON_* | UCX_* | WANDB_*) printf 'export %s=%q\n' "$name" "${!name}" ;;
    esac
  done
  for file in ~/.deepspeed_env .deepspeed_env; do
    [ -r "$file" ] || continue
    while read -r line || [ -n "$line" ]; do
      [[ ! $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || printf 'export %s=%q\n' "${line%%=*}" "${line#*=}"
    done <"$file"
  done
}

# Prints the program of a host. Its standard input comes from this script. When that ends, for whatever reason, the
# launcher gets SIGTERM and ends its ranks. So no process is left on a host, and none has to be found by name.
host_program() {
  local launcher=("$python" -u -m deepspeed.launcher.launch --log_level=error
    --world_info="$(encode_world_info "{$world}")" --node_rank="$1" --master_addr="$address" --master_port="$port"
    "${recipe[@]}" "${arguments[@]}")
  echo '{ set -m' # the launcher leads a process group, whose remaining processes are killed when it has ended
  printf 'cd %q || exit 127\n' "$PWD"
  carried_environment
  printf '%q ' "${launcher[@]}"
  # In braces, so that bash reads the whole program before the launcher starts and `read` waits for the end of input.
  cat <<'PROGRAM'
</dev/null &
launcher=$!
exec 3<&0
{ read -r _ <&3; kill "$launcher"; } >/dev/null 2>&1 &
line=$!
wait "$launcher"
status=$?
kill "$line" 2>/dev/null
kill -KILL -- -"$launcher" 2>/dev/null
exit "$status"
}
PROGRAM
}

SECONDS_TO_END=90 # the launcher gives its ranks 30 before it kills them

folder=$(mktemp -d)
pids=() lines=()
hang_up() {
  local line
  for line in "${lines[@]}"; do exec {line}>&-; done
}
end_job() {
  trap '' INT TERM HUP
  hang_up
  local rank
  SECONDS=0
  for rank in "${!pids[@]}"; do
    while kill -0 "${pids[rank]}" 2>/dev/null && [ $SECONDS -lt $SECONDS_TO_END ]; do sleep 0.2; done
    ! kill -0 "${pids[rank]}" 2>/dev/null || echo "error: ${hosts[rank]} has not ended its ranks; end them there" >&2
  done
  rm -rf "$folder"
}
trap end_job EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
trap : PIPE # ssh to an unreachable host closes its pipe before this script writes to it

mkfifo "$folder/ended"
exec {ended}<>"$folder/ended"
for rank in "${!hosts[@]}"; do
  mkfifo "$folder/$rank"
  {
    trap '' INT TERM HUP # this script alone handles Ctrl-C; ssh must live until the hosts have ended
    hang_up # this host's process must not hold the others' pipes open
    status=0
    "${ssh[@]}" "${hosts[rank]}" bash -s <"$folder/$rank" || status=$?
    echo "$status ${hosts[rank]}" >&"$ended"
  } &
  pids+=($!)
  exec {line}>"$folder/$rank"
  lines+=("$line")
  { host_program "$rank" >&"$line"; } 2>/dev/null || true
done

for _ in "${hosts[@]}"; do
  read -r status host <&"$ended"
  case $status in
    0) continue ;;
    2 | 3) ;; # train.py has printed its error
    255) echo "error: the connection to $host failed or was lost; run this again to resume" >&2 ;;
    127) echo "error: $host misses a path of this host (see above); project, Python and $PWD must exist there" >&2 ;;
    *) echo "error: $host ended with status $status (see above); run this again to resume" >&2 ;;
  esac
  exit "$status"
done
