"""The examples for other trainers: each distils when run as a user does, and its step equals the reference's.

The step is compared under plain SGD, whose update is proportional to the gradient: Adam would hide a wrongly scaled
gradient. Dropout is 0, because its random numbers depend on the split.
"""

import copy
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from families import POSITIONS
from launcher import ROOT, python
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments
from transformers import PreTrainedModel as Model

from distilspeed.kernels import reference
from distilspeed.trainer.models.loading import load_teacher, make_student

EXAMPLES = ROOT / "launch" / "examples"
LINES, STEPS = 40, 30
# Lengths and label counts differ from row to row, so that a mean of means gives another loss.
ROW_LENGTHS = (4, 60, 9, 33, 17, 50, 6, 25)
LEARNING_RATE = 0.01
TOLERANCE = 1e-5  # of the update's norm

Row = dict[str, Tensor]
Step = Callable[[ModuleType, Model, Model, list[Row], int], None]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def load_example(name: str) -> ModuleType:
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    make_student(load_teacher(str(tiny_teacher_dir)), (0, 3)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, reference_text: Path) -> Path:
    path = tmp_path_factory.mktemp("text") / "small.txt"
    lines = reference_text.read_text(encoding="utf-8").splitlines()[:LINES]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def soft_loss(student: Model, teacher: Model, lines: list[str], tokenizer: Any) -> float:
    batch = tokenizer(
        lines, truncation=True, max_length=64, padding=True, return_token_type_ids=False, return_tensors="pt"
    )
    with torch.no_grad():
        logits = student(**batch).logits, teacher(**batch).logits
    return reference.distillation_loss(*logits, soft_mask=batch["attention_mask"].bool()).kl.item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            "plain_pytorch",
            ("--batch_size", 4, "--accumulation_steps", 2),
            id="plain_pytorch",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "hf_trainer",
            ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2),
            marks=needs("accelerate"),
            id="hf_trainer",
        ),
        pytest.param(
            "lightning_module",
            ("--batch_size", 8),
            marks=[needs("lightning"), pytest.mark.full],
            id="lightning_module",
        ),
    ],
)
def test_an_example_moves_the_student_towards_its_teacher(
    name: str,
    options: tuple[object, ...],
    tiny_teacher_dir: Path,
    student_dir: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "output"
    files = ("--teacher", tiny_teacher_dir, "--student", student_dir, "--text", text, "--output_dir", output)
    done = python(EXAMPLES / f"{name}.py", *files, "--max_steps", STEPS, *options)
    assert done.returncode == 0, done.stderr

    teacher, before, after = (
        AutoModelForMaskedLM.from_pretrained(folder) for folder in (tiny_teacher_dir, student_dir, output)
    )
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    assert not [name for name in old if old[name].dim() == 2 and torch.equal(old[name], new[name])]
    lines, tokenizer = text.read_text(encoding="utf-8").splitlines(), AutoTokenizer.from_pretrained(output)
    losses = [soft_loss(student, teacher, lines, tokenizer) for student in (before, after)]
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "plain_pytorch",
        pytest.param("hf_trainer", marks=needs("accelerate")),
        pytest.param("lightning_module", marks=needs("lightning")),
    ],
)
def test_an_example_takes_a_roberta_and_long_lines(
    name: str, family_dirs: Callable[[str], Any], tmp_path: Path
) -> None:
    """A RoBERTa uses two fewer positions than its config says."""
    teacher, text = tmp_path / "teacher", tmp_path / "long.txt"
    shutil.copytree(family_dirs("roberta").teacher, teacher)
    settings = json.loads((teacher / "tokenizer_config.json").read_text()) | {"model_max_length": POSITIONS}
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    text.write_text(("the value of the list " * 100 + "\n") * 8)
    files = ("--teacher", teacher, "--student", teacher, "--text", text, "--output_dir", tmp_path / "output")
    done = python(EXAMPLES / f"{name}.py", *files, "--max_steps", 1)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_at_most_60_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def rows_of_unequal_length(vocab_size: int) -> list[Row]:
    """Return rows: row i has a label on every (i + 2)-th token, the last row has none."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for i, length in enumerate(ROW_LENGTHS):
        ids = torch.randint(vocab_size, (length,), generator=random)
        labelled = torch.arange(length) % (i + 2) == 0
        rows.append({"input_ids": ids, "labels": torch.where(labelled, ids, -100)})
    rows[-1]["labels"].fill_(-100)
    return rows


def collate(rows: list[Row]) -> Row:
    padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def sgd(student: Model) -> torch.optim.Optimizer:
    return torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)


def plain_step(
    example: ModuleType, student: Model, teacher: Model, rows: list[Row], micro_batches: int
) -> None:
    size = len(rows) // micro_batches
    batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    example.accumulate_gradient(student, teacher, batches)
    sgd(student).step()


def hf_trainer(
    example: ModuleType, student: Model, teacher: Model, rows: list[Row], micro_batches: int, **options: bool
) -> Trainer:
    settings = TrainingArguments(
        max_steps=1,
        per_device_train_batch_size=len(rows) // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_grad_norm=0,
        save_strategy="no",
        use_cpu=True,
        **options,
    )
    student.accepts_loss_kwargs = False  # as for a model whose forward takes no **kwargs
    optimizers = sgd(student), None
    return example.DistillationTrainer(
        student, settings, collate, rows, rows, teacher=teacher, optimizers=optimizers
    )


def hf_step(example: ModuleType, student: Model, teacher: Model, rows: list[Row], micro_batches: int) -> None:
    hf_trainer(example, student, teacher, rows, micro_batches).train()


def lightning_step(
    example: ModuleType, student: Model, teacher: Model, rows: list[Row], micro_batches: int
) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = example.lightning.Trainer(max_steps=1, accelerator="cpu", **quiet)
    module = example.DistillationModule(student, teacher)
    module.configure_optimizers = lambda: sgd(student)
    trainer.fit(module, torch.utils.data.DataLoader(rows, len(rows), collate_fn=collate))


def reference_loss(student: Model, teacher: Model, rows: list[Row], alpha_cos: float) -> Tensor:
    batch = collate(rows)
    mask = batch["attention_mask"].bool()
    target, output = (
        model(batch["input_ids"], attention_mask=mask, output_hidden_states=True)
        for model in (teacher, student)
    )
    losses = reference.distillation_loss(output.logits, target.logits, batch["labels"], soft_mask=mask)
    cosine = reference.cosine_loss(output.hidden_states[-1], target.hidden_states[-1], mask=mask)
    return 5 * losses.kl + 2 * losses.hard_ce + alpha_cos * cosine


@pytest.mark.parametrize(
    ("name", "step", "alpha_cos", "micro_batches"),
    [
        pytest.param("plain_pytorch", plain_step, 1, 1, id="plain_pytorch-1x8", marks=pytest.mark.full),
        pytest.param("plain_pytorch", plain_step, 1, 4, id="plain_pytorch-4x2"),
        pytest.param(
            "hf_trainer", hf_step, 0, 1, marks=[needs("accelerate"), pytest.mark.full], id="hf_trainer-1x8"
        ),
        pytest.param("hf_trainer", hf_step, 0, 4, marks=needs("accelerate"), id="hf_trainer-4x2"),
        pytest.param(
            "lightning_module",
            lightning_step,
            0,
            1,
            marks=[needs("lightning"), pytest.mark.full],
            id="lightning_module",
        ),
    ],
)
def test_a_step_equals_the_references_step_on_the_whole_batch(
    name: str,
    step: Step,
    alpha_cos: float,
    micro_batches: int,
    tiny_teacher_dir: Path,
    student_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # trainers write files beside the weights
    teacher = load_teacher(str(tiny_teacher_dir))
    student = AutoModelForMaskedLM.from_pretrained(student_dir)
    start, expected = copy.deepcopy(student), copy.deepcopy(student)
    rows = rows_of_unequal_length(teacher.config.vocab_size)
    reference_loss(expected, teacher, rows, alpha_cos).backward()
    sgd(expected).step()

    step(load_example(name), student, teacher, rows, micro_batches)

    old, wanted, new = (
        torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        for model in (start, expected, student)
    )
    assert (new - wanted).norm() < TOLERANCE * (wanted - old).norm()


@pytest.mark.full
@needs("accelerate")
def test_the_trainers_evaluation_equals_the_references_loss(
    tiny_teacher_dir: Path, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher(str(tiny_teacher_dir))
    student = AutoModelForMaskedLM.from_pretrained(student_dir)
    rows = rows_of_unequal_length(teacher.config.vocab_size)
    expected = reference_loss(student, teacher, rows, alpha_cos=0).item()

    trainer = hf_trainer(load_example("hf_trainer"), student, teacher, rows, micro_batches=4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@needs("accelerate")
@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainers_teacher_runs_in_the_precision_of_the_run(
    precision: str, tiny_teacher_dir: Path, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    teacher = load_teacher(str(tiny_teacher_dir))
    student = AutoModelForMaskedLM.from_pretrained(student_dir)
    rows = rows_of_unequal_length(teacher.config.vocab_size)
    trainer = hf_trainer(
        load_example("hf_trainer"), student, teacher, rows, micro_batches=4, bf16=precision == "bf16"
    )
    computed = []
    for name in ("query", "value"):  # their outputs have the dtype of the products
        layer = getattr(trainer.teacher.bert.encoder.layer[0].attention.self, name)
        layer.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    before = student.state_dict()["vocab_transform.weight"].clone()
    trainer.train()
    assert set(computed) == {expected}
    assert {weight.dtype for weight in trainer.teacher.parameters()} == {expected}
    assert not torch.equal(student.state_dict()["vocab_transform.weight"], before)
    assert student.dtype == torch.float32
