"""Training with the real launcher: its files, resuming, and refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from launcher import (
    CPU_CONFIG,
    ROOT,
    deepspeed,
    error_lines,
    python,
    ranks_alone,
    training_flags,
    write_config,
)
from refusals import refusal, snapshot
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM
from user_errors import assert_names

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.format import open_corpus, tokenizer_hash
from distilspeed.trainer.evaluation.quality import held_out_quality
from distilspeed.trainer.models.loading import check_fits_corpus, load_language_model
from distilspeed.trainer.training.loop import HELD_OUT_ROWS_FOR_CARD
from distilspeed.trainer.training.metrics import read_metrics

TRAIN = ROOT / "launch" / "train.py"
STEPS, SAVE_STEPS, BATCH = 12, 4, 16
MEASURED = ("time", "tokens_per_s", "mfu")


def command(teacher: Path, corpus: Path, output: Path, config: Path = CPU_CONFIG) -> list[object]:
    flags = training_flags(
        teacher,
        corpus,
        output,
        deepspeed_config=config,
        max_steps=STEPS,
        train_batch_size=BATCH,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=3,
    )
    return [TRAIN, *flags]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path
) -> Path:
    """A finished run of 12 steps on 2 ranks, with dropout in the student and DeepSpeed's CSV monitor."""
    folder = tmp_path_factory.mktemp("finished")
    teacher = folder / "teacher"
    shutil.copytree(tiny_teacher_dir, teacher)
    with_dropout = json.loads((teacher / "config.json").read_text()) | {"hidden_dropout_prob": 0.1}
    (teacher / "config.json").write_text(json.dumps(with_dropout))
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "csv"}
    config = write_config(folder / "config.json", {"csv_monitor": monitor})
    result = deepspeed(*command(teacher, small_corpus_dir, folder / "run", config), ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "log.txt").write_text(result.stdout)
    return folder


def test_the_student_loads_with_plain_transformers(finished: Path) -> None:
    program = (
        "import sys; from transformers import pipeline\n"
        f"fill = pipeline('fill-mask', model={str(finished / 'run' / 'student')!r})\n"
        "print(len(fill('the value of the [MASK] is')))\n"
        "assert not any(name.startswith('distilspeed') for name in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "5"


def test_the_student_folder_is_complete(finished: Path) -> None:
    student = finished / "run" / "student"
    names = {path.name for path in student.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= names
    model = AutoModelForMaskedLM.from_pretrained(student)
    assert model.config.n_layers == 2
    assert model.vocab_projector.weight is model.distilbert.embeddings.word_embeddings.weight
    assert {weight.dtype for weight in load_file(student / "model.safetensors").values()} == {torch.float32}
    card = (student / "README.md").read_text()
    for shown in ("| Teacher | teacher |", "temperature 2", "reference.txt", "Held-out rows", "AdamW"):
        assert shown in card
    assert str(finished) not in card


def test_the_model_card_has_the_students_results(finished: Path, small_corpus_dir: Path) -> None:
    student = finished / "run" / "student"
    accuracy, loss = ModelCard.load(student / "README.md").data.eval_results
    model = load_language_model("student", str(student))
    quality = held_out_quality(model, open_corpus(small_corpus_dir), HELD_OUT_ROWS_FOR_CARD)
    assert accuracy.metric_value == pytest.approx(quality.accuracy)
    assert loss.metric_value == pytest.approx(quality.loss)
    # The same line is in the card and in the log.
    shown = [
        line.split("| ")[2].removesuffix(" |")
        for line in (student / "README.md").read_text().splitlines()
        if line.startswith("| Held-out rows |")
    ]
    assert f"held-out rows: {shown[0]}" in (finished / "log.txt").read_text()


def test_the_students_tokenizer_returns_the_students_inputs_and_matches_the_corpus(
    finished: Path, small_corpus_dir: Path
) -> None:
    """transformers before 5 passes all outputs of a tokenizer to the model, and DistilBERT takes no token types."""
    student = finished / "run" / "student"
    saved = json.loads((student / "tokenizer_config.json").read_text())
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert list(tokenizer("the list")) == ["input_ids", "attention_mask"]
    corpus = open_corpus(small_corpus_dir)
    assert tokenizer_hash(tokenizer) == corpus.manifest.tokenizer_hash
    # As for a teacher of the next distillation.
    check_fits_corpus("teacher", str(student), load_language_model("teacher", str(student)), corpus)


def test_metrics_have_a_line_per_step_and_the_loss_falls(finished: Path) -> None:
    metrics = read_metrics(finished / "run" / "metrics.jsonl")
    assert [line.step for line in metrics] == list(range(1, STEPS + 1))
    assert metrics[-1].loss < metrics[0].loss
    for line in metrics:
        weighted = 5 * line.losses["ce"] + 2 * line.losses["mlm"] + line.losses["cos"]
        assert line.loss == pytest.approx(weighted, rel=1e-5)
        assert line.grad_norm is not None
        assert line.tokens_per_s > 0
        assert 0 < line.mfu < 1.5
    assert 0.95 * STEPS * BATCH * 64 < metrics[-1].tokens <= STEPS * BATCH * 64
    assert (finished / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_deepspeeds_monitors_get_the_metrics(finished: Path) -> None:
    rows = (finished / "csv" / "Train_loss_ce.csv").read_text().splitlines()
    assert len(rows) == 1 + STEPS
    # DeepSpeed's own events count samples, and W&B ignores steps that go back.
    steps = {line.split(",")[0] for file in (finished / "csv").glob("*.csv") for line in file.open()}
    assert steps <= {"step", *(str(step) for step in range(1, STEPS + 1))}


def test_the_newest_checkpoints_are_kept(finished: Path) -> None:
    kept = sorted(path.name for path in (finished / "run" / "checkpoints").glob("step_*"))
    assert kept == ["step_000000008", "step_000000012"]


def test_a_resume_with_other_settings_is_refused_and_changes_nothing(
    finished: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    shutil.rmtree(run / "student")
    teacher, corpus = finished / "teacher", small_corpus_dir
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    tuned = load_file(moved / "model.safetensors")
    tuned["bert.embeddings.LayerNorm.bias"][0] += 1e-4
    save_file(tuned, moved / "model.safetensors", metadata={"format": "pt"})
    other = tmp_path / "corpus"
    prepare_corpus(
        CorpusArguments(
            tokenizer=str(teacher), dataset=(), text=(ROOT / "README.md",), output_dir=other, seq_length=64
        )
    )
    config = json.loads((finished / "config.json").read_text())

    def with_changes(name: str, changes: dict[str, Any]) -> Path:
        return write_config(tmp_path / f"{name}.json", config | changes)

    zero2 = with_changes("zero2", {"zero_optimization": {"stage": 2}})
    bf16 = with_changes("bf16", {"bf16": {"enabled": True}})
    same = finished / "config.json"
    schedule, adam = config["scheduler"]["params"], config["optimizer"]["params"]
    other_schedule = with_changes(
        "warmup", {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}}
    )
    no_schedule = write_config(tmp_path / "constant.json", config, remove=("scheduler",))
    longer_warmup = with_changes(
        "longer", {"scheduler": {"type": "WarmupDecayLR", "params": schedule | {"warmup_num_steps": 5}}}
    )
    other_adam = with_changes("adam", {"optimizer": {"type": "AdamW", "params": adam | {"amsgrad": True}}})
    layout = with_changes("layout", {"zero_optimization": {"stage": 1, "round_robin_gradients": True}})
    cases: list[tuple[list[object], str, tuple[str, ...]]] = [
        ([*command(teacher, corpus, run, same), "--seed", 1], "changed-run", ("seed 0", "1")),
        (command(moved, corpus, run, same), "changed-run", ("teacher",)),
        (command(teacher, other, run, same), "changed-run", ("data",)),
        (
            [*command(teacher, corpus, run, same), "--train_batch_size", 32],
            "changed-run",
            ("train_batch_size 16", "32"),
        ),
        (
            [*command(teacher, corpus, run, same), "--per_device_train_batch_size", 2],
            "changed-run",
            ("micro_batch_size 4", "2"),
        ),
        (
            [*command(teacher, corpus, run, same), "--max_steps", 13],
            "unsuitable-schedule",
            ("12 steps", "WarmupDecayLR", "13"),
        ),
        (
            [*command(teacher, corpus, run, same), "--max_steps", 6],
            "unsuitable-schedule",
            ("12 steps", "WarmupDecayLR", "6"),
        ),
        (
            command(teacher, corpus, run, other_schedule),
            "changed-run",
            ("scheduler.type WarmupDecayLR", "WarmupLR"),
        ),
        (
            command(teacher, corpus, run, no_schedule),
            "changed-run",
            ("scheduler.type WarmupDecayLR", "none"),
        ),
        (
            command(teacher, corpus, run, longer_warmup),
            "changed-run",
            ("scheduler.params.warmup_num_steps 2", "5"),
        ),
        (
            command(teacher, corpus, run, other_adam),
            "changed-run",
            ("optimizer.params.amsgrad none", "True"),
        ),
        (
            command(teacher, corpus, run, layout),
            "changed-run",
            ("zero_optimization.round_robin_gradients none", "True"),
        ),
        (
            [*command(teacher, corpus, run, same), "--temperature", 3],
            "changed-run",
            ("temperature 2.0", "3.0"),
        ),
        ([*command(teacher, corpus, run, same), "--alpha_cos", 0], "changed-run", ("alphas",)),
        (
            [*command(teacher, corpus, run, same), "--student_layers", "0,1"],
            "changed-run",
            ("student_layers [0, 3]", "[0, 1]"),
        ),
        (
            [*command(teacher, corpus, run, same), "--restrict_ce_to_mask"],
            "changed-run",
            ("restrict_ce_to_mask False", "True"),
        ),
        (
            [*command(teacher, corpus, run, same), "--mlm_smoothing", 0],
            "changed-run",
            ("mlm_smoothing 0.7", "0.0"),
        ),
        (command(teacher, corpus, run, zero2), "changed-run", ("zero_stage 1", "2")),
        (command(teacher, corpus, run, bf16), "changed-run", ("precision fp32", "bf16")),
    ]
    for (_, *arguments), code, named in cases:
        line = refusal("train.py", [*arguments, "--resume"], tmp_path, monkeypatch, capfd)
        assert_names(line, code, *named)


def test_a_finished_run_is_compared_before_it_is_reported_complete(
    finished: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, config = tmp_path / "run", finished / "config.json"
    shutil.copytree(finished / "run", run)
    (_, *same) = command(finished / "teacher", small_corpus_dir, run, config)
    cases = [
        (["--temperature", 3], "changed-run", "temperature 2.0"),
        (["--seed", 1], "changed-run", "seed 0"),
        (["--max_steps", 13], "unsuitable-schedule", "12 steps"),
        (["--max_steps", 6], "unsuitable-schedule", "12 steps"),
        (["--learning_rate", 1e-4], "finished-run", "optimizer.params.lr"),
    ]
    for more, code, named in cases:
        line = refusal("train.py", [*same, *more, "--resume"], tmp_path, monkeypatch, capfd)
        assert_names(line, code, named)


def test_checkpoints_without_the_runs_record_are_refused(
    finished: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    (run / "train_config.json").unlink()
    (_, *same) = command(finished / "teacher", small_corpus_dir, run, finished / "config.json")
    line = refusal("train.py", [*same, "--resume"], tmp_path, monkeypatch, capfd)
    assert_names(line, "damaged-record", str(run), "train_config.json")


@pytest.mark.parametrize("name", ["student/thesis.txt", "metrics.jsonl", "loss.png"])
def test_files_that_are_not_of_a_run_are_not_taken_for_one(
    finished: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The launch scripts always resume, so a mistyped --output_dir must not cost its files."""
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    (_, *same) = command(finished / "teacher", small_corpus_dir, tmp_path / "mine", finished / "config.json")
    line = refusal("train.py", [*same, "--resume"], tmp_path, monkeypatch, capfd)
    assert_names(line, "output-exists", str(tmp_path / "mine"), name.partition("/")[0])


@pytest.mark.full
@pytest.mark.parametrize("left", ["", None])
def test_metrics_that_were_lost_end_a_run_in_one_line(
    finished: Path, small_corpus_dir: Path, tmp_path: Path, left: str | None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    shutil.rmtree(run / "student")
    (run / "metrics.jsonl").unlink() if left is None else (run / "metrics.jsonl").write_text(left)
    arguments = command(finished / "teacher", small_corpus_dir, run, finished / "config.json")
    result = ranks_alone(*arguments, "--resume", ranks=1)
    assert result.returncode == 2
    (line,) = error_lines(result)
    assert_names(line, "damaged-record", "metrics.jsonl")


@pytest.mark.full
def test_a_student_whose_replacement_was_killed_is_restored(
    finished: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    before = snapshot(run / "student")
    (run / "student").rename(run / ".student.previous")
    arguments = command(finished / "teacher", small_corpus_dir, run, finished / "config.json")
    result = ranks_alone(*arguments, "--resume", ranks=1)
    assert result.returncode == 0, result.stderr
    assert "complete" in result.stdout
    assert snapshot(run / "student") == before
    assert not (run / ".student.previous").exists()


@pytest.mark.parametrize(
    ("second", "code", "named"),
    [
        ({}, "output-exists", "--resume"),
        pytest.param({"resume": True, "seed": 1}, "changed-run", "seed 0", marks=pytest.mark.full),
    ],
)
def test_the_second_of_two_jobs_in_one_new_folder_does_not_use_the_firsts_files(
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    second: dict[str, Any],
    code: str,
    named: str,
) -> None:
    same = {
        "deepspeed_config": str(CPU_CONFIG),
        "teacher": str(tiny_teacher_dir),
        "data_dir": str(small_corpus_dir),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
    }
    job = tmp_path / "job.json"
    job.write_text(json.dumps([same, same | second]))
    result = python(Path(__file__).with_name("race_job.py"), job)
    assert "the first is done" in result.stdout, result.stderr
    assert result.returncode == 2
    (line,) = error_lines(result)
    assert_names(line, code, named)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_finished_run_is_left_alone(finished: Path, small_corpus_dir: Path) -> None:
    before = snapshot(finished / "run")
    arguments = command(finished / "teacher", small_corpus_dir, finished / "run", finished / "config.json")
    result = ranks_alone(*arguments, "--resume", ranks=1)
    assert result.returncode == 0
    assert "complete" in result.stdout
    assert snapshot(finished / "run") == before


def test_masked_language_modelling_without_a_teacher(
    tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    config = tiny_teacher_dir / "config.json"
    arguments = [*command(Path("none"), small_corpus_dir, tmp_path / "run"), "--student_config", config]
    result = ranks_alone(*arguments, ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert isinstance(AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "student"), BertForMaskedLM)
    assert "token_type_ids" in AutoTokenizer.from_pretrained(tmp_path / "run" / "student")("the list")
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1].losses["ce"] == 0


def test_the_plan_is_printed_and_nothing_is_written(
    tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    result = ranks_alone(*command(tiny_teacher_dir, small_corpus_dir, tmp_path / "run"), "--plan", ranks=1)
    assert result.returncode == 0, result.stderr
    assert "global batch 16 = micro-batch 4 x 4 accumulation steps x 1 ranks" in result.stdout
    assert "GiB of tensors per GPU" in result.stdout
    assert not (tmp_path / "run").exists()


def test_bad_input_on_two_ranks_is_printed_by_rank_0_only(
    tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    arguments = [*command(tiny_teacher_dir, small_corpus_dir, tmp_path / "run"), "--train_batch_size", 18]
    result = deepspeed(*arguments, ranks=2)
    assert result.returncode == 2
    (line,) = error_lines(result)
    assert_names(line, "indivisible-batch", "train_batch_size 18")
    assert not (tmp_path / "run").exists()
