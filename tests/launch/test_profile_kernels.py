"""launch/profile_kernels.py: its table, files, exit status and error line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from user_errors import assert_names

COMMAND = Path(__file__).parents[2] / "launch" / "profile_kernels.py"
SMALL = ("--tokens", 32, "--vocab_size", 100, "--hidden_size", 16, "--device", "cpu", "--repeats", 2)
CASES = {
    "logits": {
        "distillation_loss",
        "distillation_loss, inplace_backward",
        "weighted_distillation_loss",
        "weighted_distillation_loss, inplace",
        "eager recipe",
        "Liger kl_div and cross_entropy",
        "NeMo soft cross-entropy",
    },
    "linear": {
        "linear_distillation_loss",
        "projections, distillation_loss",
        "projections, eager recipe",
        "Liger fused linear",
        "matrix products alone",
    },
    "cosine": {"cosine_loss", "eager cosine"},
}
COMPILED_CASES = {
    "logits": {"torch.compile of the recipe", "torch.compile, no masked_select"},
    "linear": {"Liger fused linear, compiled"},
    "cosine": {"torch.compile of eager cosine", "torch.compile cosine, no masked_select"},
}


def run_profile(*options: object) -> subprocess.CompletedProcess[str]:
    # On tiny tensors two threads cost more than they save.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, COMMAND, *SMALL, *options]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=1200, env=environment
    )


def check_complete(profile: dict[str, Any], table: str, expected: dict[str, set[str]]) -> None:
    """Check that every case is in the table once and in the profile, with figures or a reason for skipping it."""
    assert [group["name"] for group in profile["groups"]] == list(expected)
    cells = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    for group in profile["groups"]:
        names = [case["name"] for case in [*group["cases"], *group["skipped"]]]
        assert sorted(names) == sorted(expected[group["name"]])
        assert [cells.count(name) for name in names] == [1] * len(names)
        assert all(case["reason"] for case in group["skipped"])
        assert group["roof"] > 0
        for case in group["cases"]:
            assert case["peak_memory_bytes"] > 0
            for phase in ("forward", "backward", "both"):
                figures = case[phase]
                if figures["floor"] == 0:
                    assert figures.pop("rate") is figures.pop("share_of_roof") is None
                    figures.pop("floor")
                assert all(0 < value < float("inf") for value in figures.values()), (case["name"], phase)


def test_the_command_prints_a_table_and_writes_its_files(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "profile"
    done = run_profile("--peers", "eager,liger,nemo", "--output_dir", output, "--trace")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.iterdir()) == ["profile.json", "roofline.png", "trace.json"]
    assert [path.name for path in output.parent.iterdir()] == ["profile"]

    profile = json.loads((output / "profile.json").read_text())
    check_complete(profile, done.stdout, CASES)
    assert profile["conditions"]["tokens"] == 32
    assert profile["conditions"]["dtype"] == "float32"
    assert profile["conditions"]["copy_bandwidth_gb_per_s"] > 0
    machine = profile["machine"]
    assert {"device", "cpu", "threads", "torch_version", "python_version", "date"} <= {
        name for name, value in machine.items() if value
    }
    assert "--peers eager,liger,nemo" in machine["command"]

    assert (output / "roofline.png").read_bytes().startswith(b"\x89PNG")
    spans = {event.get("name") for event in json.loads((output / "trace.json").read_text())["traceEvents"]}
    assert {case["name"] for group in profile["groups"] for case in group["cases"]} <= spans
    assert "USDT" not in done.stderr


@pytest.mark.full
def test_all_peers(tmp_path: Path) -> None:
    output = tmp_path / "profile"
    done = run_profile("--dtype", "bf16", "--output_dir", output)
    assert done.returncode == 0, done.stderr
    profile = json.loads((output / "profile.json").read_text())
    check_complete(profile, done.stdout, {name: CASES[name] | COMPILED_CASES[name] for name in CASES})


def test_bad_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = run_profile("--tokens", 0, "--output_dir", tmp_path / "runs" / "profile")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert_names(line, "bad-argument", "--tokens")
    assert not any(tmp_path.iterdir())
