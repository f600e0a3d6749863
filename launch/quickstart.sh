#!/usr/bin/env bash
# Distil a small BERT, train a baseline and print a table that compares them; see --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_venv.sh

usage="bash launch/quickstart.sh [--output_dir runs/quickstart]
    distils the BERT of launch/quickstart/teacher from 4 to 2 layers under DeepSpeed, trains the same student without a
    teacher, and compares the three on books that none of them has seen; 5 to 8 minutes on 2 CPU cores after
    installing; needs no GPU, and no network but for installing

bash launch/quickstart.sh --from_scratch [--output_dir runs/from_scratch]
    also pre-trains the teacher, a smaller one, on text found on this machine; 10 minutes

bash launch/quickstart.sh --teacher ID_OR_DIR (--dataset NAME[:CONFIG[:SPLIT]] | --text FILE)...
                          [--deepspeed_config ds_configs/gpu_bf16.json] [--num_train_epochs 3] [--output_dir DIR]
    does the same with your own teacher, for example google-bert/bert-base-uncased

Run the same command again to resume a stopped run."

fail() {
  echo "error: ${1//[[:cntrl:]]/ }" >&2
  exit 2
}

unset out
teacher='' config='' epochs=3 text=() from_scratch=''
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) echo "$usage" && exit 0 ;;
    --from_scratch) from_scratch=yes && shift ;;
    --output_dir | --teacher | --deepspeed_config | --num_train_epochs | --dataset | --text)
      [ $# -ge 2 ] || fail "$1 needs a value; see bash launch/quickstart.sh --help"
      case $1 in
        --output_dir) out=$2 ;;
        --teacher) teacher=$2 ;;
        --deepspeed_config) config=$2 ;;
        --num_train_epochs) epochs=$2 ;;
        *) text+=("$1" "$2") ;;
      esac
      shift 2
      ;;
    *) fail "unknown argument $1; see bash launch/quickstart.sh --help" ;;
  esac
done
[ -z "$teacher" ] && [ ${#text[@]} -gt 0 ] && fail "--dataset and --text need a --teacher; give one, or leave them out"
[ -n "$teacher" ] && [ ${#text[@]} -eq 0 ] && fail "--teacher needs text; give --dataset or --text"
[ -n "$teacher" ] && [ -n "$from_scratch" ] && fail "--from_scratch makes a teacher, and --teacher names one; omit one of them"
[ -z "$config" ] || [ -f "$config" ] || [ -f "ds_configs/$config.json" ] || fail "there is no DeepSpeed config $config; see ds_configs/"
[[ $epochs =~ ^[0-9]*\.?[0-9]*$ && $epochs =~ [1-9] ]] || fail "--num_train_epochs is '$epochs'; it must be a number above 0"
[ -n "$from_scratch" ] && default=runs/from_scratch || default=runs/quickstart
out=${out-$default}
mkdir -p -- "$out" 2>/dev/null || fail "cannot make the folder $out; choose another --output_dir"
out=$(cd -- "$out" && pwd)

setup_venv "[train]"
choose_accelerator
export PATH=$PWD/.venv/bin:$PATH
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

step() { printf '\n== %s\n' "$1"; }
train() { deepspeed --log_level error --master_port "$port" "${ranks[@]}" launch/train.py --deepspeed_config "$config" --data_dir "$out/corpus" --resume "$@"; }

corpus() { # FOLDER OPTIONS
  [ -e "$out/$1/manifest.json" ] ||
    python launch/prepare_data.py "${@:2}" --tokenizer "$tokenizer" --seq_length "$length" --output_dir "$out/$1"
}

# The small recipes take one rank, whatever the machine has: their batches are too small to share.
length=128 layers=() held_out=corpus evaluation=() ranks=(--num_gpus 1)
if [ -n "$from_scratch" ]; then
  config=${config:-ds_configs/cpu.json}
  recipe=(--max_steps 200 --train_batch_size 32 --learning_rate 1e-3)
  step "text and tokenizer from the installed packages"
  [ -e "$out/data/teacher_config.json" ] || python launch/quickstart_data.py --output_dir "$out/data"
  tokenizer=$out/data/tokenizer text=(--text "$out/data/text.txt")
elif [ -z "$teacher" ]; then
  config=${config:-ds_configs/cpu.json} teacher=launch/quickstart/teacher
  # The teacher has learnt with masks drawn uniformly. Without training, its layers 0 and 1 predict best.
  recipe=(--max_steps 300 --train_batch_size 8 --mlm_smoothing 0)
  layers=(--student_layers 0,1) held_out=held_out
  tokenizer=$teacher text=(--text launch/quickstart/books.txt.xz) evaluation=(--max_rows 300)
  for example in "He put his [MASK] in his pocket." "She looked at him with tears in her [MASK]." \
    "The king drew his [MASK] and rode into the battle."; do
    evaluation+=(--fill_mask "$example")
  done
else
  config=${config:-ds_configs/gpu_bf16.json} length=512 ranks=()
  recipe=(--num_train_epochs "$epochs")
  tokenizer=$teacher
fi

step "corpus"
corpus corpus "${text[@]}"
[ "$held_out" = corpus ] || corpus "$held_out" --text launch/quickstart/held_out_books.txt.xz --held_out_fraction 0.4

if [ -n "$from_scratch" ]; then
  step "a small BERT teacher, pre-trained by masked language modelling"
  train --teacher none --student_config "$out/data/teacher_config.json" --output_dir "$out/teacher" \
    --max_steps 1000 --train_batch_size 32 --learning_rate 2e-3 --save_steps 250
  teacher=$out/teacher/student
fi

step "the distilled student"
train --teacher "$teacher" --output_dir "$out/distilled" "${layers[@]}" "${recipe[@]}"

step "the same student, trained without a teacher on the same tokens"
train --teacher none --student_config "$out/distilled/student" --output_dir "$out/baseline" "${recipe[@]}"

step "teacher, student and baseline"
[ -e "$out/evaluation/report.md" ] ||
  python launch/evaluate.py --teacher "$teacher" --student "$out/distilled/student" "${evaluation[@]}" \
    --baseline "$out/baseline/student" --data_dir "$out/$held_out" --output_dir "$out/evaluation" --resume >/dev/null
cat "$out/evaluation/report.md"
