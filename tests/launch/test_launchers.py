"""torchrun and accelerate start ranks, too; bad input prints one line and the launcher's own report."""

import json
import sys
from pathlib import Path

import pytest
from jobs import cpu_environment, finish, start
from launcher import ROOT, free_port
from user_errors import assert_names

BESIDE = Path(sys.executable).parent
SCRIPT, MODULE = [ROOT / "launch" / "train.py"], ["-m", "distilspeed.launch.train"]
TORCHRUN = [BESIDE / "torchrun", "--nproc_per_node", 2, "--master_port"]
# Without --multi_gpu it starts one rank on a CPU.
ACCELERATE = [BESIDE / "accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--main_process_port"]


@pytest.mark.parametrize(
    ("launcher", "program"),
    [
        pytest.param(TORCHRUN, SCRIPT, id="torchrun"),
        pytest.param(TORCHRUN, MODULE, id="torchrun -m", marks=pytest.mark.full),
        pytest.param(ACCELERATE, SCRIPT, id="accelerate", marks=pytest.mark.full),
    ],
)
def test_other_launchers_train_on_two_ranks_and_refuse_bad_input(
    launcher: list[object],
    program: list[object],
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
) -> None:
    arguments = ["--deepspeed_config", "cpu", "--teacher", tiny_teacher_dir, "--data_dir", small_corpus_dir]
    arguments += ["--output_dir", "run", "--max_steps", 2]

    def run() -> tuple[int, list[str]]:
        command = [*launcher, free_port(), *program, *arguments]
        status, _, errors = finish(start(command, cpu_environment(), tmp_path))
        return status, errors.splitlines()

    status, errors = run()
    assert status == 0, errors
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    record = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert record["identity"]["train_batch_size"] == 16  # micro-batches of 8 on two ranks
    status, errors = run()
    assert status == 1
    (line,) = [line for line in errors if line.startswith("error: ")]
    assert_names(line, "output-exists", "run", "--resume", "--output_dir")
    # The launcher's report names the rank that ended first, and its status.
    assert any("exitcode  : 2" in line for line in errors)
