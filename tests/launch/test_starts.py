"""A student that does not start from its teacher's layers: it trains as in plain PyTorch, and its start is recorded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import assert_same_end
from launcher import CPU_CONFIG, ROOT, ranks_alone, train_all, training_flags, training_options, write_config
from plain_steps import change, copied_weights, plain_loss, plain_steps_of
from refusals import refusal
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
)
from user_errors import assert_names

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.data.masking import SMOOTHING
from distilspeed.trainer.evaluation.quality import held_out_quality
from distilspeed.trainer.models.loading import load_teacher, make_student, model_from_config
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.identity import identity_of
from distilspeed.trainer.training.metrics import read_metrics
from distilspeed.trainer.training.run import prepare_run

# Plain SGD, because its update is proportional to the gradient.
BATCH, STEPS, LEARNING_RATE, SEED = 12, 2, 0.02, 3
SGD = {
    "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
# The settings in the records of version 0.1, which runs from a teacher's layers or a config alone must keep.
NAMES_BEFORE = [
    *("teacher", "student", "student_layers", "data", "train_batch_size", "micro_batch_size", "total_steps"),
    *("precision", "zero_stage", "optimizer", "seed", "alphas", "temperature", "restrict_ce_to_mask"),
]
NARROW = {"dim": 16, "n_heads": 2, "n_layers": 3, "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path) -> Path:
    """Runs of two steps from each start, and one that was resumed after its first step."""
    folder = tmp_path_factory.mktemp("starts")
    config = write_config(folder / "sgd.json", SGD, remove=("scheduler",))
    teacher = load_teacher(str(tiny_teacher_dir))
    # As an earlier run left it: three of the teacher's layers with other weights.
    torch.manual_seed(1)
    earlier = make_student(teacher, (0, 1, 3))
    with torch.no_grad():
        for weight in earlier.parameters():
            weight += 0.05 * torch.randn_like(weight)
    earlier.save_pretrained(folder / "earlier")
    DistilBertConfig(
        vocab_size=teacher.config.vocab_size, max_position_embeddings=64, initializer_range=0.2, **NARROW
    ).save_pretrained(folder / "narrow_config")

    def run(output: str, teacher: object, **more: object) -> dict[str, Any]:
        return (
            training_options(
                teacher,
                small_corpus_dir,
                folder / output,
                deepspeed_config=config,
                max_steps=STEPS,
                save_steps=1,
                train_batch_size=BATCH,
                per_device_train_batch_size=BATCH // 3,
                seed=SEED,
            )
            | more
        )

    further = run("further", tiny_teacher_dir, student=str(folder / "earlier"))
    alone = run("alone", "none", student=str(tiny_teacher_dir), mlm_smoothing=smoothing_of("alone"))
    narrow = run("narrow", tiny_teacher_dir, student_config=str(folder / "narrow_config"))
    train_all(folder, [further, alone, narrow], ranks=1)
    shutil.copytree(folder / "further", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "student")
    shutil.rmtree(max((folder / "resumed" / "checkpoints").glob("step_*")))
    train_all(folder, [further | {"output_dir": str(folder / "resumed"), "resume": True}], ranks=1)
    return folder


def start_of(runs: Path, name: str, teacher_dir: Path) -> PreTrainedModel:
    if name == "narrow":
        return model_from_config(str(runs / "narrow_config"), SEED)
    return AutoModelForMaskedLM.from_pretrained(runs / "earlier" if name == "further" else teacher_dir)


def smoothing_of(name: str) -> float:
    return 0.0 if name == "alone" else SMOOTHING


def teacher_of(name: str, teacher_dir: Path) -> PreTrainedModel | None:
    return None if name == "alone" else load_teacher(str(teacher_dir))


@pytest.mark.parametrize("name", ["further", "alone", "narrow"])
def test_its_steps_equal_those_of_plain_pytorch(
    runs: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, name: str
) -> None:
    start, teacher = start_of(runs, name, tiny_teacher_dir), teacher_of(name, tiny_teacher_dir)
    equation, smoothing = BatchEquation(BATCH, BATCH, 1, 1), smoothing_of(name)
    batch = MicroBatches(open_corpus(small_corpus_dir), equation, 0, SEED, smoothing)[0]
    lines = read_metrics(runs / name / "metrics.jsonl")
    with torch.no_grad():
        assert lines[0].loss == pytest.approx(plain_loss(start, teacher, batch).item(), rel=1e-5)
    before = copied_weights(start)
    student = AutoModelForMaskedLM.from_pretrained(runs / name / "student")
    update = change(copied_weights(student), before)
    rates = [LEARNING_RATE] * STEPS
    expected, norms = plain_steps_of(start, teacher, small_corpus_dir, BATCH, rates, SEED, smoothing)
    assert (update - expected).norm() < 1e-5 * expected.norm()
    assert [line.grad_norm for line in lines] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("name", ["further", "alone", "narrow"])
def test_the_export_is_its_kind_of_model_and_better_than_its_start(
    runs: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, name: str
) -> None:
    corpus, start = open_corpus(small_corpus_dir), start_of(runs, name, tiny_teacher_dir)
    student = AutoModelForMaskedLM.from_pretrained(runs / name / "student")
    assert type(student) is (BertForMaskedLM if name == "alone" else DistilBertForMaskedLM)
    assert student.config.num_hidden_layers == (4 if name == "alone" else 3)
    before, after = (held_out_quality(model, corpus, max_rows=16) for model in (start, student))
    assert after.loss < before.loss


def test_the_cosine_of_hidden_states_of_unequal_widths_takes_no_part(runs: Path) -> None:
    for name, losses in (("further", ["ce", "mlm", "cos"]), ("narrow", ["ce", "mlm"])):
        assert [*read_metrics(runs / name / "metrics.jsonl")[0].losses] == losses
        card = (runs / name / "student" / "README.md").read_text()
        assert ("| Hidden states |" in card) == (name == "further")
        assert (runs / name / "loss.png").is_file()


def test_the_model_card_names_the_start(runs: Path, tiny_teacher_dir: Path) -> None:
    for name, row in (
        ("further", "| Student starts from | model earlier |"),
        ("alone", f"| Starts from | model {tiny_teacher_dir.name} |"),
        ("narrow", "| Student starts from | random weights from config narrow_config |"),
    ):
        assert row in (runs / name / "student" / "README.md").read_text()


def test_only_what_is_given_adds_to_the_form_of_record_of_before(
    runs: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    names = {
        name: list(json.loads((runs / name / "train_config.json").read_text())["identity"])
        for name in ("further", "alone", "narrow")
    }
    assert names["further"] == [*NAMES_BEFORE[:11], "starting_student", *NAMES_BEFORE[11:]]
    assert names["alone"] == [*NAMES_BEFORE[:11], "starting_student", "mlm_smoothing", *NAMES_BEFORE[11:]]
    assert names["narrow"] == [*NAMES_BEFORE[:11], "student_config", *NAMES_BEFORE[11:]]
    arguments = TrainArguments(
        deepspeed_config=CPU_CONFIG,
        data_dir=small_corpus_dir,
        output_dir=tmp_path / "run",
        teacher=str(tiny_teacher_dir),
    )
    assert list(identity_of(prepare_run(arguments))) == NAMES_BEFORE


def test_resume_is_bitwise(runs: Path) -> None:
    assert_same_end(runs / "resumed", runs / "further")
    first, again = (
        (runs / run / "metrics.jsonl").read_text().splitlines()[0] for run in ("further", "resumed")
    )
    assert again == first, "its times differ: the first step was taken again"


def test_resuming_from_another_start_is_refused(
    runs: Path,
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    other = AutoModelForMaskedLM.from_pretrained(runs / "earlier")
    with torch.no_grad():
        other.vocab_layer_norm.bias[0] += 1e-4
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_teacher_dir).save_pretrained(tmp_path / "other")
    further, narrow = (
        [
            *training_flags(
                tiny_teacher_dir,
                small_corpus_dir,
                runs / name,
                deepspeed_config=runs / "sgd.json",
                max_steps=STEPS,
                train_batch_size=BATCH,
                per_device_train_batch_size=BATCH // 3,
                seed=SEED,
            ),
            "--resume",
        ]
        for name in ("further", "narrow")
    )
    # The same shape, but another model.
    other_config = json.loads((runs / "narrow_config" / "config.json").read_text()) | {"activation": "relu"}
    (tmp_path / "relu.json").write_text(json.dumps(other_config))
    for command, named in (
        ([*narrow, "--student_config", tmp_path / "relu.json"], "with student_config "),
        ([*further, "--student", tmp_path / "other"], "with starting_student "),
        ([*further, "--student_layers", "0,1,3"], "with student_layers [], not [0, 1, 3]"),
        ([*narrow, "--student_layers", "0,1,3"], "with student {"),
    ):
        line = refusal("train.py", command, runs, monkeypatch, capfd)
        assert_names(line, "changed-run", named)


def test_the_plan_names_the_start_and_the_missing_loss(
    runs: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    flags = training_flags(tiny_teacher_dir, small_corpus_dir, tmp_path / "run", max_steps=1)
    result = ranks_alone(
        ROOT / "launch" / "train.py", *flags, "--student_config", runs / "narrow_config", "--plan", ranks=1
    )
    assert result.returncode == 0, result.stderr
    assert "student: starts from random weights from config narrow_config\n" in result.stdout
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("loss_cos"))
    assert "16" in line
    assert "32" in line
    assert not (tmp_path / "run").exists()
