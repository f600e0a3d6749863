"""launch/finetune.py: its export, learning from a fine-tuned teacher, exact resume, and refusals."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import cpu_environment, kill, start, wait_until
from launcher import ROOT, ranks_alone
from refusals import refusal
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, ElectraConfig, GPT2Config, pipeline
from user_errors import assert_names, raises_user_error

from distilspeed.trainer.evaluation.finetune import _check_output_dir
from distilspeed.trainer.evaluation.finetune_arguments import FinetuneArguments
from distilspeed.trainer.files import alone_in
from distilspeed.trainer.models.loading import load_teacher, make_student

FINETUNE = ROOT / "launch" / "finetune.py"
SMALL = (
    "--num_train_epochs",
    4,
    "--learning_rate",
    2e-3,
    "--per_device_train_batch_size",
    16,
    "--device",
    "cpu",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path) -> Path:
    """A folder with a task, a pre-trained model "model" and its student "student", with tokenizers."""
    folder = tmp_path_factory.mktemp("finetune")
    words = ("list", "class")
    task = folder / "words"
    task.mkdir()
    for name, numbers in (("train", range(96)), ("dev", range(96, 128))):
        records = [{"text": f"the {words[i % 2]} number {i // 2}", "label": words[i % 2]} for i in numbers]
        (task / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.copytree(tiny_teacher_dir, folder / "model")
    make_student(load_teacher(str(tiny_teacher_dir)), (0, 3)).save_pretrained(folder / "student")
    for file in tiny_teacher_dir.glob("tokenizer*"):
        shutil.copy(file, folder / "student")
    return folder


def finetune(work: Path, model: str, output: str, *more: object) -> str:
    options = ("--model", work / model, "--task", work / "words", "--output_dir", work / output)
    result = ranks_alone(FINETUNE, *options, *SMALL, *more, ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def tuned_teacher(work: Path) -> Path:
    shown = finetune(work, "model", "tuned/teacher")
    assert shown.startswith("words accuracy ")
    return work / "tuned" / "teacher"


def test_plain_transformers_loads_the_model_with_names_of_the_classes(tuned_teacher: Path) -> None:
    classify = pipeline("text-classification", model=str(tuned_teacher))
    assert [classify(f"the {word} number 7")[0]["label"] for word in ("list", "class")] == ["list", "class"]
    results = json.loads((tuned_teacher / "results.json").read_text())
    assert results["scores"]["accuracy"] > 0.9
    assert results["fine_tuning"] == {"epochs": 4, "learning_rate": 2e-3, "batch_size": 16, "max_length": 64}
    assert "Scores on dev | accuracy" in (tuned_teacher / "README.md").read_text()
    assert not list(tuned_teacher.glob("*checkpoint*"))


def test_a_student_learns_from_the_teachers_outputs_alone(work: Path, tuned_teacher: Path) -> None:
    """Its own labels have no weight, and in the task's file they are all wrong."""
    wrong = work / "wrong"
    wrong.mkdir()
    for name in ("train", "dev"):
        text = (work / "words" / f"{name}.jsonl").read_text()
        if name == "train":
            text = text.replace('"label": "list"', '"label": "x"').replace(
                '"label": "class"', '"label": "list"'
            )
            text = text.replace('"label": "x"', '"label": "class"')
        (wrong / f"{name}.jsonl").write_text(text)
    options = ("--model", work / "student", "--task", wrong, "--output_dir", work / "tuned" / "soft", *SMALL)
    weights = ("--alpha_ce", 1, "--alpha_task", 0, "--teacher", tuned_teacher)
    result = ranks_alone(FINETUNE, *options, *weights, ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((work / "tuned" / "soft" / "results.json").read_text())
    assert results["scores"]["accuracy"] > 0.9
    assert (results["temperature"], results["alpha_ce"], results["alpha_task"]) == (2.0, 1.0, 0.0)
    assert results["teacher"] == "tuned/teacher"
    assert AutoConfig.from_pretrained(work / "tuned" / "soft").model_type == "distilbert"


def test_killed_and_resumed_it_ends_with_the_same_bits(work: Path, tuned_teacher: Path) -> None:
    more = ("--teacher", tuned_teacher, "--save_steps", 2, "--num_train_epochs", 6)
    finetune(work, "student", "whole", *more)
    options = (
        "--model",
        work / "student",
        "--task",
        work / "words",
        "--output_dir",
        work / "killed",
        *SMALL,
        *more,
    )
    job = start([sys.executable, FINETUNE, *options], cpu_environment(), work)
    wait_until((work / "killed" / "checkpoint.pt").is_file, job)
    kill(job)
    assert not (work / "killed" / "results.json").exists()
    (work / "killed" / "log.txt").write_text("mine")
    finetune(work, "student", "killed", *more, "--resume")
    ours, theirs = (load_file(work / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    results = [(work / name / "results.json").read_text() for name in ("killed", "whole")]
    assert results[0] == results[1]
    assert (work / "killed" / "log.txt").read_text() == "mine"
    assert not (work / "killed" / "checkpoint.pt").exists()
    again = (work / "killed" / "results.json").stat().st_mtime_ns
    finetune(work, "student", "killed", *more, "--resume")
    assert (work / "killed" / "results.json").stat().st_mtime_ns == again


def test_a_finished_run_is_not_reused_for_other_inputs_of_the_same_names(
    work: Path,
    tuned_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    inputs = {"model": work / "student", "teacher": tuned_teacher, "task": work / "words"}
    for name, folder in inputs.items():
        shutil.copytree(folder, tmp_path / name)
    command = [part for name in inputs for part in (f"--{name}", name)]
    command += ["--output_dir", "out", "--num_train_epochs", "1", "--device", "cpu"]
    result = ranks_alone(FINETUNE, *command, ranks=1, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    monkeypatch.chdir(tmp_path)
    for name in inputs:
        file = tmp_path / name / ("train.jsonl" if name == "task" else "model.safetensors")
        before = file.read_bytes()
        if name == "task":
            file.write_bytes(before + b'{"text": "one more", "label": "list"}\n')
        else:
            weights = load_file(file)
            weights[min(weights)] += 1
            save_file(weights, file, metadata={"format": "pt"})
        line = refusal("finetune.py", [*command, "--resume"], tmp_path, monkeypatch, capfd)
        assert_names(line, "changed-run", "out/results.json", f"{name}_digest")
        file.write_bytes(before)


def test_a_run_killed_during_its_first_save_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.incomplete").touch()
    arguments = FinetuneArguments(model="student", task="words", output_dir=tmp_path, resume=True)
    _check_output_dir(arguments)
    with raises_user_error("output-exists", "--resume"):
        _check_output_dir(replace(arguments, resume=False))


def test_bf16_learns_with_float32_weights(work: Path) -> None:
    finetune(work, "student", "bf16", "--bf16")
    results = json.loads((work / "bf16" / "results.json").read_text())
    assert results["precision"] == "bf16"
    assert results["scores"]["accuracy"] > 0.9
    assert {weight.dtype for weight in load_file(work / "bf16" / "model.safetensors").values()} == {
        torch.float32
    }


REFUSED = {
    "--output_dir tuned/teacher": ("output-exists", "tuned/teacher", "--resume"),
    "--teacher student": ("damaged-model", "student", "fine-tuned"),
    "--teacher other_task": ("unsupported-model", "other_task", "class, list"),
    "--teacher tuned/teacher --alpha_ce 0 --alpha_task 0": ("bad-argument", "--alpha_ce", "--alpha_task"),
    "--task glue": ("bad-argument", "glue/mrpc"),
    "--task nowhere": ("bad-task", "nowhere"),
    "--bf16 --fp16": ("conflicting-arguments", "--bf16", "--fp16"),
    "--fp16 --device cpu": ("unsupported-precision", "fp16 needs a GPU"),
    "--model no/such/folder": ("unusable-tokenizer", "no/such/folder"),
    "--model electra": ("unsupported-model", "electra"),
    "--model gpt2": ("unsupported-model", "gpt2", "causal"),
    "--teacher electra": ("unsupported-model", "electra"),
    "--resume --output_dir tuned/teacher": ("changed-run", "tuned/teacher/results.json"),
    "--resume --output_dir foreign": ("output-exists", "foreign"),
    "--output_dir used": ("locked", "used"),
    "--resume --output_dir damaged": ("damaged-checkpoint", "damaged/checkpoint.pt"),
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_refused_in_one_line(
    work: Path,
    tuned_teacher: Path,
    arguments: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(work)
    if not (work / "other_task").exists():
        shutil.copytree(tuned_teacher, work / "other_task")
        config = json.loads((work / "other_task" / "config.json").read_text())
        config |= {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
        (work / "other_task" / "config.json").write_text(json.dumps(config))
        for name, config in (("electra", ElectraConfig()), ("gpt2", GPT2Config())):
            config.save_pretrained(work / name)
            for file in (work / "student").glob("tokenizer*"):
                shutil.copy(file, work / name)
        for name in ("foreign/file", "damaged/checkpoint.pt"):
            (work / name).parent.mkdir()
            (work / name).write_text("x")
    given = {"--model": "student", "--task": "words", "--output_dir": "out"}
    parts = arguments.split()
    defaults = [part for name, value in given.items() if name not in parts for part in (name, value)]
    with alone_in(work / "used"):
        line = refusal("finetune.py", [*defaults, *parts], work, monkeypatch, capfd)
    code, *named = REFUSED[arguments]
    assert_names(line, code, *named)


def test_a_checkpoint_of_other_settings_is_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Checked once the model is loaded, but before it is trained."""
    folder = work / "changed"
    folder.mkdir()
    torch.save({"identity": {"task": "words", "seed": 1}, "step": 2, "state": {}}, folder / "checkpoint.pt")
    options = ("--model", work / "student", "--task", work / "words", "--output_dir", folder, "--resume")
    line = refusal("finetune.py", list(options), folder, monkeypatch, capfd)
    assert_names(line, "changed-run", "checkpoint.pt")
