"""Builds that are killed and resumed."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from user_errors import raises_user_error

from distilspeed.trainer.corpus import build, pool, unfinished
from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.writer import RowWriter
from distilspeed.trainer.errors import UserError

PATIENCE = 600.0  # seconds until a test gives up waiting

# A build in its own process, with small batches and a progress record after each batch.
BUILD = """
import pathlib, sys
from distilspeed.trainer.corpus import build, pool, unfinished

if __name__ == "__main__":
    pool.BATCH_CHARACTERS, unfinished.SECONDS_BETWEEN_RECORDS = 20_000, 0
    text, tokenizer, output_dir, kill_at = sys.argv[1:]
    if kill_at == "before the rename":
        unfinished.sync_tree = lambda folder: __import__("os").kill(__import__("os").getpid(), 9)
    build.prepare_corpus(
        build.CorpusArguments(
            text=(pathlib.Path(text),), tokenizer=tokenizer, output_dir=pathlib.Path(output_dir),
            seq_length=64, held_out_fraction=0.1, num_proc=1, resume=True,
        )
    )
"""


@pytest.fixture
def arguments(
    arguments: CorpusArguments, reference_text: Path, monkeypatch: pytest.MonkeyPatch
) -> CorpusArguments:
    """A build of about forty batches."""
    monkeypatch.setattr(pool, "BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(unfinished, "SECONDS_BETWEEN_RECORDS", 0.0)
    return replace(arguments, text=(reference_text,))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def progress_of(output_dir: Path) -> dict[str, dict[str, object]]:
    return json.loads((incomplete(output_dir) / "progress.json").read_text())


def incomplete(output_dir: Path) -> Path:
    return output_dir.with_name(f"{output_dir.name}.incomplete")


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let the build fail just after it has written batch ``after``, before the record of its progress."""
    add, batches = RowWriter.add, iter(range(1 << 30))

    def failing(writer: RowWriter, batch: pool.PackedBatch) -> None:
        add(writer, batch)
        if next(batches) == after:
            raise error

    monkeypatch.setattr(RowWriter, "add", failing)


@pytest.mark.parametrize(
    "kill_at", [*(pytest.param(moment, marks=pytest.mark.full) for moment in (0, 1, "before the rename")), 12]
)
def test_a_killed_build_is_resumed_to_the_same_bytes(
    arguments: CorpusArguments, tmp_path: Path, kill_at: int | str
) -> None:
    if kill_at == 12:  # with documents without text, in a compressed file
        texts = arguments.text[0].read_text(encoding="utf-8").splitlines()
        texts = [text for number, text in enumerate(texts) for text in [text, [None, ""][number % 2]]]
        records = tmp_path / "records.gz"
        records.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))
        arguments = replace(arguments, text=(records,))
    prepare_corpus(replace(arguments, output_dir=tmp_path / "whole"))
    whole = contents(tmp_path / "whole")
    script, output_dir = tmp_path / "build.py", tmp_path / "killed"
    script.write_text(BUILD)
    process = subprocess.Popen(
        [
            sys.executable,
            str(script),
            str(arguments.text[0]),
            arguments.tokenizer,
            str(output_dir),
            str(kill_at),
        ],
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if isinstance(kill_at, int):
        deadline = time.monotonic() + PATIENCE
        data, records = incomplete(output_dir) / "train" / "data.arrow", 0
        record = None
        while records < kill_at or not data.is_file():
            assert process.poll() is None, "the build ended before it was killed"
            assert time.monotonic() < deadline, "the build did not write enough records in time"
            progress_file = data.parents[1] / "progress.json"
            latest = progress_file.stat().st_mtime_ns if progress_file.is_file() else None
            records, record = records + (latest != record), latest
            time.sleep(0.001)
        process.kill()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert not output_dir.exists()
    documents = progress_of(output_dir)["written"]["counts"]["documents"] if kill_at != 0 else 0
    tokenized = count_tokenized(
        lambda: prepare_corpus(replace(arguments, output_dir=output_dir, resume=True))
    )
    assert contents(output_dir) == whole
    assert not incomplete(output_dir).exists()
    if kill_at != 0:
        assert 0 < documents == json.loads(whole["manifest.json"])["counts"]["documents"] - tokenized


def count_tokenized(run: Callable[[], object]) -> int:
    """Return how many documents a build hands to its workers."""
    documents = 0

    def counting(*arguments: object) -> object:
        nonlocal documents
        for batch in pack(*arguments):
            documents += batch.documents
            yield batch

    pack = build.pack_documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "pack_documents", counting)
        run()
    return documents


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        UserError("unusable-dataset", "cannot read the dataset x: Server Disconnected; check the connection"),
        pytest.param(OSError(28, "No space left on device"), marks=pytest.mark.full),
    ],
    ids=["stopped", "lost connection", "full disk"],
)
def test_an_interrupted_build_can_be_resumed(
    arguments: CorpusArguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    prepare_corpus(replace(arguments, output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt(patch, 5, error)
        code = error.code if isinstance(error, UserError) else "unwritable-output"
        is_stopped = isinstance(error, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt) if is_stopped else raises_user_error(code):
            prepare_corpus(arguments)
    message = capsys.readouterr().err
    assert str(incomplete(arguments.output_dir)) in message
    assert "--resume" in message
    prepare_corpus(replace(arguments, resume=True, num_proc=2))
    assert contents(arguments.output_dir) == contents(tmp_path / "whole")


def test_bad_input_leaves_nothing(arguments: CorpusArguments, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = arguments.text[0].read_text(encoding="utf-8").splitlines()
    bad.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines) + "{\n")
    with raises_user_error("not-json", "bad.jsonl"):
        prepare_corpus(replace(arguments, text=(bad,)))
    assert not arguments.output_dir.parent.exists()


@pytest.fixture
def interrupted(arguments: CorpusArguments, monkeypatch: pytest.MonkeyPatch) -> CorpusArguments:
    with monkeypatch.context() as patch:
        interrupt(patch, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(arguments)
    return arguments


def test_two_builds_of_the_same_corpus_cannot_run_at_once(interrupted: CorpusArguments) -> None:
    import fcntl

    descriptor = os.open(incomplete(interrupted.output_dir), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with raises_user_error("locked", str(interrupted.output_dir)):
        prepare_corpus(replace(interrupted, resume=True))
    os.close(descriptor)
    prepare_corpus(replace(interrupted, resume=True))


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda progress: progress["written"].update(train_bytes="many"), "written.train_bytes"),
        (lambda progress: progress["written"]["counts"].update(documents=-0.5), "written.counts.documents"),
        (lambda progress: progress["recipe"].pop("shard"), "recipe.shard"),
        (lambda progress: progress.clear(), "recipe"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line_that_names_the_field(
    interrupted: CorpusArguments, damage: Callable[[dict[str, dict[str, Any]]], object], field: str
) -> None:
    progress = progress_of(interrupted.output_dir)
    damage(progress)
    (incomplete(interrupted.output_dir) / "progress.json").write_text(json.dumps(progress))
    with raises_user_error("damaged-build", "progress.json", field):
        prepare_corpus(replace(interrupted, resume=True))


def test_a_shard_stays_if_its_data_set_cannot_be_reached_when_it_is_resumed(
    interrupted: CorpusArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the hub is down: no document has been read when the error comes."""

    def unreachable(*_: object) -> None:
        raise UserError(
            "unusable-dataset", "cannot read the dataset x: Connection refused; check the connection"
        )

    before = contents(incomplete(interrupted.output_dir))
    with monkeypatch.context() as patch:
        patch.setattr(build, "pack_documents", unreachable)
        with raises_user_error("unusable-dataset"):
            prepare_corpus(replace(interrupted, resume=True))
    assert contents(incomplete(interrupted.output_dir)).keys() == before.keys()
