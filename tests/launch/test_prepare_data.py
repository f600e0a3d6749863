"""The command launch/prepare_data.py, as a user runs it."""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from user_errors import assert_names, raises_user_error

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.job.processes import STOP_SIGNALS

COMMAND = Path(__file__).resolve().parents[2] / "launch" / "prepare_data.py"
PATIENCE = 600.0  # seconds until a test gives up waiting


def start(*arguments: object, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, str(COMMAND), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )


def run(*arguments: object) -> tuple[int, str, str]:
    process = start(*arguments)
    output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output, errors


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} seconds"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers_of(pid: int) -> list[int]:
    """Return the tokenising processes, also those that are starting."""
    return [
        child for child in children_of(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def long_text(reference_text: Path, tmp_path: Path) -> Path:
    """A text that takes many seconds to prepare."""
    path = tmp_path / "long.txt"
    path.write_bytes(reference_text.read_bytes() * 100)
    return path


def start_and_wait_for_rows(text: Path, tokenizer: Path, output_dir: Path) -> subprocess.Popen[str]:
    process = start(
        "--text",
        text,
        "--tokenizer",
        tokenizer,
        "--seq_length",
        64,
        "--output_dir",
        output_dir,
        "--num_proc",
        2,
    )
    wait_until(
        lambda: any(path.stat().st_size > 1 << 16 for path in output_dir.parent.glob("*/train/data.arrow"))
    )
    return process


def test_text_becomes_a_corpus_and_a_summary(
    reference_text: Path, small_tokenizer_dir: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records.NDJSON.gz"
    records.write_bytes(gzip.compress(b'{"text": null}\n{"text": " "}\n{"text": "a"}\n{"text": null}\n'))
    status, output, errors = run(
        "--text",
        reference_text,
        records,
        "--tokenizer",
        small_tokenizer_dir,
        "--output_dir",
        tmp_path / "corpus",
    )
    assert (status, errors) == (0, "")
    manifest = open_corpus(tmp_path / "corpus", verify_checksums=True).manifest
    assert manifest.seq_length == 512
    for number in (manifest.counts.documents, manifest.counts.train_rows, manifest.counts.held_out_tokens):
        assert f"{number:,}" in output
    assert "dropped 2 null and 1 blank documents," in output
    assert f"{manifest.padding_fraction:.2%}" in output


def test_a_document_per_sentence_gives_a_warning(small_tokenizer_dir: Path, tmp_path: Path) -> None:
    sentences = tmp_path / "sentences.txt"
    sentences.write_text(
        "the list is empty\n" * 30 + "the list is empty and the name is not found in the class\n" * 70
    )
    options = ("--tokenizer", small_tokenizer_dir, "--output_dir", tmp_path / "corpus")
    status, _, errors = run("--text", sentences, *options)
    assert status == 0
    assert errors.startswith("warning: 30% of the pieces were too short")


def test_shards_are_prepared_and_merged(
    reference_text: Path, small_tokenizer_dir: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / f"shard{index}" for index in range(2)]
    for index, folder in enumerate(folders):
        options = ["--shard", f"{index}/2", "--resume", "--output_dir", folder]
        status, _, errors = run("--text", reference_text, "--tokenizer", small_tokenizer_dir, *options)
        assert (status, errors) == (0, "")
    status, output, errors = run("--merge", *folders, "--output_dir", tmp_path / "corpus")
    assert (status, errors) == (0, "")
    counts = open_corpus(tmp_path / "corpus", verify_checksums=True).manifest.counts
    assert counts.documents == len(reference_text.read_text(encoding="utf-8").splitlines())
    assert f"{counts.documents:,} documents" in output


def test_bad_input_is_one_line_and_status_2(small_tokenizer_dir: Path, tmp_path: Path) -> None:
    options = ["--text", "nowhere.txt", "--tokenizer", small_tokenizer_dir]
    status, output, errors = run(*options, "--output_dir", tmp_path / "out" / "corpus")
    assert (status, output) == (2, "")
    [line] = errors.splitlines()
    assert line.startswith("error: ")
    assert_names(line, "missing-file", "nowhere.txt", "--text", "--dataset")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("stop", STOP_SIGNALS)
def test_stopping_it_leaves_no_files_and_no_processes(
    long_text: Path, small_tokenizer_dir: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    process = start_and_wait_for_rows(long_text, small_tokenizer_dir, tmp_path / "out" / "corpus")
    workers = children_of(process.pid)
    os.killpg(process.pid, stop)  # as Ctrl-C and a batch system do: the workers get it, too
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + stop
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    wait_until(lambda: not any(map(is_running, workers)))


@pytest.mark.parametrize("stop", STOP_SIGNALS)
def test_stopping_it_while_its_processes_start_prints_no_traceback(
    reference_text: Path, small_tokenizer_dir: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    options = ["--text", reference_text, "--tokenizer", small_tokenizer_dir, "--num_proc", 3]
    process = start(*options, "--output_dir", tmp_path / "out" / "corpus")
    wait_until(lambda: workers_of(process.pid))
    os.killpg(process.pid, stop)
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output, errors) == (128 + stop, "", "")
    assert not (tmp_path / "out").exists()


def test_under_nohup_it_outlives_its_terminal(
    reference_text: Path, small_tokenizer_dir: Path, tmp_path: Path
) -> None:
    options = ["--text", reference_text, "--tokenizer", small_tokenizer_dir, "--num_proc", 2]
    process = start(*options, "--output_dir", tmp_path / "corpus", prefix=["nohup"])
    wait_until(lambda: workers_of(process.pid))
    os.killpg(process.pid, signal.SIGHUP)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    open_corpus(tmp_path / "corpus", verify_checksums=True)


def test_killing_it_leaves_no_corpus_and_no_process(
    long_text: Path, small_tokenizer_dir: Path, tmp_path: Path
) -> None:
    output_dir = tmp_path / "out" / "corpus"
    process = start_and_wait_for_rows(long_text, small_tokenizer_dir, output_dir)
    workers = children_of(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=PATIENCE)
    wait_until(lambda: not any(map(is_running, workers)))
    [left] = output_dir.parent.iterdir()
    assert left.name == "corpus.incomplete"
    for folder in (output_dir, left):
        with raises_user_error("not-a-corpus", str(folder)):
            open_corpus(folder)


def test_a_cache_that_cannot_be_written_is_named(
    small_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a document"}\n')
    (tmp_path / "occupied").write_text("no folder")
    options = ["--dataset", tmp_path / "data", "--tokenizer", small_tokenizer_dir]
    output_dir, cache = tmp_path / "out" / "corpus", tmp_path / "occupied" / "cache"
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    status, output, errors = run(*options, "--output_dir", output_dir)
    assert (status, output) == (2, "")
    [line] = errors.splitlines()
    assert line.startswith("error: ")
    assert_names(line, "unwritable-output", str(cache), "Not a directory", "HF_HOME", "HF_DATASETS_CACHE")
    assert not output_dir.parent.exists()
