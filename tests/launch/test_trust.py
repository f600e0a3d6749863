"""The commands never run code of their input, use the network, print secrets or widen permissions."""

import json
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher import CPU_CONFIG, ROOT, environment
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import load_tokenizer
from distilspeed.trainer.corpus.sources import dataset_source
from distilspeed.trainer.errors import UserErrorCode
from distilspeed.trainer.models.loading import load_language_model, model_from_config

SECRETS = {
    "HF_TOKEN": "hf_b3V0c2lkZXIx",
    "WANDB_API_KEY": "0a1b2c3d4e5f60718293",
    "MY_PASSWORD": "correct horse battery",
}
UMASK = 0o027

# sitecustomize.py of every Python process of a command: a connection that leaves the machine is recorded and fails.
GUARD = """
import os, socket

def guarded(function, host_of):
    def call(*arguments, **options):
        host = host_of(arguments)
        if host not in (None, "", "localhost", socket.gethostname()) and not str(host).startswith(("127.", "::1")):
            with open(os.environ["NETWORK_LOG"], "a") as log:
                log.write(f"{host}\\n")
            raise OSError(f"no network: {host}")
        return function(*arguments, **options)
    return call

def peer(arguments):
    return None if arguments[0].family == socket.AF_UNIX else arguments[1][0]

socket.getaddrinfo = guarded(socket.getaddrinfo, lambda arguments: arguments[0])
for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name), peer))
"""


def run_guarded(folder: Path, *arguments: object) -> str:
    """Run a command with secrets in its environment; check that it prints none and stays offline; return its output."""
    (folder / "sitecustomize.py").write_text(GUARD)
    log = folder / "network.log"
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**environment(), **SECRETS, "PYTHONPATH": str(folder), "NETWORK_LOG": str(log)},
        capture_output=True,
        text=True,
        umask=UMASK,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not log.exists(), log.read_text()
    assert not [name for name, secret in SECRETS.items() if secret in done.stdout + done.stderr]
    return done.stdout


def check_files(folder: Path) -> None:
    """Check that no file has a secret, and that modes follow the umask, except DeepSpeed's scripts in checkpoints."""
    paths = [folder, *folder.rglob("*")]
    assert len(paths) > 2
    for path in paths:
        content = b"" if path.is_dir() else path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path
        mode = stat.S_IMODE(path.stat().st_mode)
        if "checkpoints" not in path.parts:
            assert mode == (0o777 if path.is_dir() else 0o666) & ~UMASK, (path, oct(mode))


def test_the_guard_records_a_connection(tmp_path: Path) -> None:
    for reach in (
        "socket.create_connection(('192.0.2.1', 80))",
        "socket.socket().connect(('192.0.2.1', 80))",
    ):
        with pytest.raises(AssertionError, match="no network"):
            run_guarded(tmp_path, "-c", f"import socket; {reach}")


@pytest.mark.full
def test_commands_use_no_network_print_no_secrets_and_follow_the_umask(
    reference_text: Path, small_tokenizer_dir: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    guard = tmp_path / "guard"
    guard.mkdir()
    launch, corpus, run = ROOT / "launch", tmp_path / "corpus", tmp_path / "run"
    text = ("--text", reference_text, "--tokenizer", small_tokenizer_dir, "--seq_length", 64)
    run_guarded(guard, launch / "prepare_data.py", *text, "--num_proc", 1, "--output_dir", corpus)
    check_files(corpus)

    training = ("--deepspeed_config", CPU_CONFIG, "--teacher", tiny_teacher_dir, "--data_dir", corpus)
    batch = ("--train_batch_size", 8, "--per_device_train_batch_size", 8, "--max_steps", 2)
    run_guarded(guard, launch / "train.py", *training, *batch, "--output_dir", run)
    assert {"student", "train_config.json"} <= {path.name for path in run.iterdir()}
    assert (run / "student" / "README.md").exists()
    check_files(run)

    models = ("--teacher", tiny_teacher_dir, "--student", run / "student", "--data_dir", corpus)
    few = ("--max_rows", 8, "--device", "cpu", "--output_dir", tmp_path / "evaluation")
    run_guarded(guard, launch / "evaluate.py", *models, *few)
    check_files(tmp_path / "evaluation")

    sizes = ("--tokens", 32, "--vocab_size", 100, "--hidden_size", 16, "--device", "cpu", "--repeats", 1)
    run_guarded(
        guard, launch / "profile_kernels.py", *sizes, "--peers", "none", "--output_dir", tmp_path / "profile"
    )
    check_files(tmp_path / "profile")


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    executed = tmp_path / "executed"
    code = {"AutoConfig": "code.Config", "AutoModelForMaskedLM": "code.Model"}
    for name, content in (
        ("config.json", json.dumps({"model_type": "their_own", "auto_map": code})),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}})),
        ("code.py", f"open({str(executed)!r}, 'w')"),
        (f"{tmp_path.name}.py", f"open({str(executed)!r}, 'w')"),  # the name of a dataset's script
    ):
        (tmp_path / name).write_text(content)
    loads: list[tuple[UserErrorCode, Callable[[], object]]] = [
        ("unusable-model", lambda: load_language_model("student", str(tmp_path))),
        ("unusable-model", lambda: model_from_config(str(tmp_path), seed=0)),
        ("unusable-tokenizer", lambda: load_tokenizer(str(tmp_path))),
        ("unusable-dataset", lambda: list(dataset_source(str(tmp_path), "text").documents())),
    ]
    for code, load in loads:
        with raises_user_error(code):
            load()
    assert not executed.exists()


def test_only_the_benchmark_of_the_original_unpickles() -> None:
    """DeepSpeed's checkpoints are pickles, too; docs/operations.md says so.

    workers.py reads what processes of the same command send to each other.
    """
    loads = re.compile(
        r"pickle\.load|torch\.load\((?!self\.path, weights_only=True)|allow_pickle=True|trust_remote_code=True"
        r"|weights_only=False"
    )
    found = {
        path.name: loads.findall(path.read_text(encoding="utf-8"))
        for part in ("launch", "trainer", "kernels")
        for path in (ROOT / part).rglob("*.py")
    }
    assert {name: calls for name, calls in found.items() if calls} == {
        "benchmark_preparation.py": ["pickle.load"],
        "workers.py": ["pickle.load"] * 3,
    }
