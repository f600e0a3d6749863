"""GPT-2: pre-training without a teacher, generation, a step on two ranks, and what does not go together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import ModelCard
from launcher import CPU_CONFIG, train_all, training_options, write_config
from plain_steps import change, copied_weights, plain_steps
from refusals import refusal
from transformers import AutoModelForCausalLM, AutoTokenizer
from user_errors import assert_names

from distilspeed.trainer.models.loading import load_language_model, load_teacher, make_student
from distilspeed.trainer.training.metrics import read_metrics

if TYPE_CHECKING:
    from refusals import Inputs, Refused

LAYERS, RATE, BATCH = (0, 3), 0.02, 12


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, family_dirs: Callable[[str], Any]) -> Path:
    """A GPT-2 trained from random weights, without a teacher."""
    folder, folders = tmp_path_factory.mktemp("pretrained"), family_dirs("gpt2")
    run = training_options(
        Path("none"),
        folders.corpus,
        folder / "run",
        student_config=folders.teacher / "config.json",
        max_steps=4,
        train_batch_size=BATCH,
        per_device_train_batch_size=4,
    )
    train_all(folder, [run], ranks=1)
    return folder / "run"


def test_pre_training_has_the_causal_loss_alone(pretrained: Path) -> None:
    lines = read_metrics(pretrained / "metrics.jsonl")
    for line in lines:
        assert set(line.losses) == {"ce", "clm", "cos"}
        assert line.losses["ce"] == line.losses["cos"] == 0
        assert line.loss == pytest.approx(0.5 * line.losses["clm"])
    assert lines[-1].losses["clm"] < lines[0].losses["clm"]
    identity = json.loads((pretrained / "train_config.json").read_text())["identity"]
    assert identity["alphas"] == [5.0, 0.5, 1.0]
    assert ModelCard.load(pretrained / "student" / "README.md").data.pipeline_tag == "text-generation"


def test_plain_transformers_generates_text_with_the_student(pretrained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pretrained / "student")
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    model = AutoModelForCausalLM.from_pretrained(pretrained / "student")
    assert model.config.use_cache
    inputs = tokenizer("the value of", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 8
    assert tokenizer.decode(generated[0]).startswith("the value of")


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 3])
def test_the_step_on_two_ranks_is_that_of_plain_pytorch(
    family_dirs: Callable[[str], Any], tmp_path: Path, stage: int
) -> None:
    folders = family_dirs("gpt2")
    sgd = {
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
    }
    run = training_options(
        folders.teacher,
        folders.corpus,
        tmp_path / "run",
        deepspeed_config=write_config(tmp_path / "sgd.json", sgd, remove=("scheduler",)),
        student_layers=LAYERS,
        max_steps=2,
        train_batch_size=BATCH,
        per_device_train_batch_size=3,
    )
    train_all(tmp_path, [run], ranks=2)
    start = copied_weights(make_student(load_teacher(str(folders.teacher)), LAYERS))
    student = load_language_model("student", str(tmp_path / "run" / "student"))
    expected, norms = plain_steps(folders.teacher, folders.corpus, LAYERS, BATCH, [RATE] * 2)
    assert (change(copied_weights(student), start) - expected).norm() < 1e-5 * expected.norm()
    assert [line.grad_norm for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == pytest.approx(
        norms, rel=1e-5
    )


def test_a_corpus_of_the_other_objective_is_refused(
    inputs: "Inputs", refused: "Refused", family_dirs: Callable[[str], Any]
) -> None:
    folders = family_dirs("gpt2")
    line = refused(inputs.command(data_dir=folders.corpus))
    assert_names(line, "objective-mismatch", str(inputs.teacher), str(folders.corpus), "masked", "causal")
    line = refused(inputs.command(teacher=folders.teacher))
    assert_names(line, "objective-mismatch", str(folders.teacher), str(inputs.corpus), "masked", "causal")


@pytest.mark.parametrize(
    "flags", [("--alpha_mlm", 2), ("--restrict_ce_to_mask",), ("--mlm_smoothing", 0)], ids=str
)
def test_flags_of_masked_language_modelling_are_refused_for_gpt2(
    inputs: "Inputs", refused: "Refused", family_dirs: Callable[[str], Any], flags: tuple[object, ...]
) -> None:
    folders = family_dirs("gpt2")
    line = refused(inputs.command(*flags, teacher=folders.teacher, data_dir=folders.corpus))
    assert_names(line, "conflicting-arguments", str(flags[0]), "causal")


def test_the_flag_of_causal_language_modelling_is_refused_for_bert(
    inputs: "Inputs", refused: "Refused"
) -> None:
    assert_names(refused(inputs.command("--alpha_clm=0.5")), "conflicting-arguments", "--alpha_clm", "masked")


def test_the_benchmark_refuses_a_causal_corpus(
    family_dirs: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folders = family_dirs("gpt2")
    arguments = [
        *("--deepspeed_config", CPU_CONFIG, "--teacher", folders.teacher),
        "--data_dir",
        folders.corpus,
    ]
    arguments += ["--train_batch_size", 4, "--per_device_train_batch_size", 2]
    line = refusal("benchmark.py", arguments, tmp_path, monkeypatch, capfd)
    assert_names(line, "unsupported-model", str(folders.corpus), "causal")
