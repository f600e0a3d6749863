"""Every family trains: steps equal those of plain PyTorch, resume is bitwise, the student loads and is evaluated."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY_FAMILIES
from jobs import assert_same_end, chosen
from launcher import ROOT, ranks_alone, train_all, training_options, write_config
from plain_steps import change, copied_weights, plain_steps
from transformers import AutoTokenizer, ModernBertForMaskedLM

from distilspeed.trainer.corpus.format import open_corpus, tokenizer_hash
from distilspeed.trainer.families.registry import family_of
from distilspeed.trainer.models.loading import (
    load_language_model,
    load_teacher,
    make_student,
    select_teacher_layers,
)
from distilspeed.trainer.training.metrics import read_metrics

# Plain SGD, because its update is proportional to the gradient.
BATCH, STEPS, LEARNING_RATE = 12, 2, 0.02
SGD = {
    "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
STRONG = {"roberta", "gpt2"}
NAMES = [pytest.param(name, marks=() if name in STRONG else pytest.mark.full) for name in TINY_FAMILIES]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    family_dirs: Callable[[str], Any],
) -> Path:
    """The runs of each chosen family: "NAME", "NAME_split" on two ranks, and "NAME_resumed" after its first step."""
    folder = tmp_path_factory.mktemp("families")
    config = write_config(folder / "sgd.json", SGD, remove=("scheduler",))
    cases = sorted(chosen(request, test_steps_equal_those_of_plain_pytorch.__name__, "name", "run"))
    names = sorted({name for name, _ in cases})

    def run(name: str, output: str, **more: object) -> dict[str, Any]:
        folders = family_dirs(name)
        return (
            training_options(
                folders.teacher,
                folders.corpus,
                folder / output,
                deepspeed_config=config,
                max_steps=STEPS,
                save_steps=1,
                train_batch_size=BATCH,
                per_device_train_batch_size=BATCH // 3,
            )
            | more
        )

    train_all(folder, [run(name, name) for name in names], ranks=1)
    if split := [
        run(name, name + kind, per_device_train_batch_size=BATCH // 6) for name, kind in cases if kind
    ]:
        train_all(folder, split, ranks=2)
    for name in names:
        copy = folder / f"{name}_resumed"
        shutil.copytree(folder / name, copy)
        shutil.rmtree(copy / "student")
        shutil.rmtree(max((copy / "checkpoints").glob("step_*")))
    train_all(folder, [run(name, f"{name}_resumed", resume=True) for name in names], ranks=1)
    return folder


@pytest.mark.parametrize("run", ["", pytest.param("_split", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_those_of_plain_pytorch(
    runs: Path, family_dirs: Callable[[str], Any], name: str, run: str
) -> None:
    folders = family_dirs(name)
    teacher = load_teacher(str(folders.teacher))
    layers = select_teacher_layers(teacher.config, None)
    start = copied_weights(make_student(teacher, layers))
    # Loaded, because the file names tied weights in another way than the model.
    student = load_language_model("student", str(runs / f"{name}{run}" / "student"))
    update = change(copied_weights(student), start)
    expected, norms = plain_steps(folders.teacher, folders.corpus, layers, BATCH, [LEARNING_RATE] * STEPS)
    assert (update - expected).norm() < 1e-5 * expected.norm()
    assert [
        line.grad_norm for line in read_metrics(runs / f"{name}{run}" / "metrics.jsonl")
    ] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bitwise(runs: Path, name: str) -> None:
    assert_same_end(runs / f"{name}_resumed", runs / name)
    first, again = (
        (runs / run / "metrics.jsonl").read_text().splitlines()[0] for run in (name, f"{name}_resumed")
    )
    assert again == first, "its times differ: the first step was taken again"


@pytest.mark.parametrize("name", NAMES)
def test_plain_transformers_loads_the_student_and_its_tokenizer(
    runs: Path, family_dirs: Callable[[str], Any], name: str
) -> None:
    folder = runs / name / "student"
    teacher = load_teacher(str(family_dirs(name).teacher))
    student, loading = family_of(teacher.config).model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer_hash(tokenizer) == open_corpus(family_dirs(name).corpus).manifest.tokenizer_hash
    with torch.no_grad():
        logits = student(**tokenizer("the value of the list", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_evaluated(runs: Path, family_dirs: Callable[[str], Any], name: str, tmp_path: Path) -> None:
    folders = family_dirs(name)
    result = ranks_alone(
        ROOT / "launch" / "evaluate.py",
        *("--teacher", folders.teacher, "--student", runs / name / "student"),
        *("--data_dir", folders.corpus, "--output_dir", tmp_path / "report", "--max_rows", 4),
        ranks=1,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "report" / "report.md").is_file()


@pytest.mark.full
def test_models_of_two_families_with_one_tokenizer_are_compared(
    family_dirs: Callable[[str], Any], tmp_path: Path
) -> None:
    folders = family_dirs("roberta")
    tokenizer = AutoTokenizer.from_pretrained(folders.teacher)
    config = TINY_FAMILIES["modernbert"].config(tokenizer)
    ModernBertForMaskedLM(config).save_pretrained(tmp_path / "modernbert")
    tokenizer.save_pretrained(tmp_path / "modernbert")
    result = ranks_alone(
        ROOT / "launch" / "evaluate.py",
        *("--teacher", folders.teacher, "--student", tmp_path / "modernbert"),
        *("--data_dir", folders.corpus, "--output_dir", tmp_path / "report", "--max_rows", 4),
        ranks=1,
    )
    assert result.returncode == 0, result.stderr[-3000:]
