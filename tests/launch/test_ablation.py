"""launch/ablation.py: variants are trained by the real launcher and evaluated, a stopped ablation goes on, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launcher import ROOT, flags, python, training_options, write_config
from refusals import refusal
from safetensors.torch import load_file, save_file
from user_errors import assert_names

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.evaluation.fine_tuning import fine_tune
from distilspeed.trainer.evaluation.tasks.registry import read_tasks
from distilspeed.trainer.files import alone_in
from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.training.metrics import read_metrics

ABLATION = ROOT / "launch" / "ablation.py"
VARIANTS = ("random_weights", "no_teacher_from_layers", "untrained")


def options(teacher: Path, corpus: Path, output: Path, **changed: object) -> list[object]:
    given = training_options(
        teacher,
        corpus,
        output,
        max_steps=2,
        seeds=1,
        variants=",".join(VARIANTS),
        train_batch_size=8,
        max_rows=4,
        device="cpu",
        mlm_smoothing=0.5,
        task_epochs=8,
        task_learning_rates="1e-5,1e-3",
        task_precision="bf16",
    )
    return flags(given | changed)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    task = folder / "words"
    task.mkdir()
    records = [{"text": f"the {('list', 'class')[i % 2]} {i}", "label": i % 2} for i in range(16)]
    for name in ("train", "dev"):
        (task / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = python(ABLATION, *options(tiny_teacher_dir, small_corpus_dir, folder / "out", task=task))
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


@pytest.mark.full
def test_every_variant_is_trained_from_its_start_and_evaluated(done: Path, tiny_teacher_dir: Path) -> None:
    report = json.loads((done / "out" / "ablation.json").read_text())
    assert [result["name"] for result in report["results"]] == ["full", *VARIANTS]
    assert all(list(result["scores"][0]) == ["held-out accuracy", "words"] for result in report["results"])
    assert (done / "stdout.txt").read_text().strip() in (done / "out" / "ablation.md").read_text()
    start = make_student(load_teacher(str(tiny_teacher_dir)), (0, 3)).state_dict()
    name = "distilbert.transformer.layer.0.ffn.lin1.weight"

    def distance(folder: Path) -> float:
        return (load_file(folder / "student" / "model.safetensors")[name] - start[name]).norm().item()

    runs = {variant: done / "out" / variant / "seed_0" / "run" for variant in ("full", *VARIANTS[:2])}
    assert 0 < distance(runs["full"]) < 0.1 * start[name].norm()
    assert 0 < distance(runs["no_teacher_from_layers"]) < 0.1 * start[name].norm()
    assert distance(runs["random_weights"]) > 0.5 * start[name].norm()
    assert torch.equal(load_file(done / "out" / "untrained_student" / "model.safetensors")[name], start[name])
    losses = {variant: read_metrics(run / "metrics.jsonl")[-1].losses for variant, run in runs.items()}
    assert (losses["full"]["ce"] > 0, losses["no_teacher_from_layers"]["ce"] > 0) == (True, False)
    for run in runs.values():
        assert json.loads((run / "train_config.json").read_text())["identity"]["mlm_smoothing"] == 0.5


@pytest.mark.full
def test_the_scores_on_tasks_are_those_of_the_best_learning_rate(done: Path, small_corpus_dir: Path) -> None:
    (task,) = read_tasks([str(done / "words")])
    student = done / "out" / "full" / "seed_0" / "run" / "student"
    tokenizer = open_corpus(small_corpus_dir).load_tokenizer()

    def score(rate: float) -> float:
        settings = replace(task.fine_tuning, epochs=8, learning_rate=rate, max_length=64)
        return fine_tune(str(student), task, tokenizer, settings, 0, torch.device("cpu"), "bf16")["accuracy"]

    scores = [score(1e-5), score(1e-3)]
    report = json.loads((done / "out" / "ablation.json").read_text())
    assert report["results"][0]["scores"][0]["words"] == max(scores) != min(scores)


@pytest.mark.full
def test_a_stopped_ablation_goes_on_where_it_was(
    done: Path, tiny_teacher_dir: Path, small_corpus_dir: Path
) -> None:
    """As after a kill in the evaluation of one variant, and in the training of another."""
    output = done / "out"
    before = (output / "ablation.json").read_text()
    kept = output / "full" / "seed_0" / "scores.json"
    written = kept.stat().st_mtime_ns
    (output / "random_weights" / "seed_0" / "scores.json").unlink()
    stopped = output / "no_teacher_from_layers" / "seed_0"
    (stopped / "scores.json").unlink()
    shutil.rmtree(stopped / "run" / "student")
    command = options(tiny_teacher_dir, small_corpus_dir, output, task=done / "words")
    command[command.index("--teacher") + 1] = f"{tiny_teacher_dir}/"
    result = python(ABLATION, *command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert kept.stat().st_mtime_ns == written
    ours, theirs = (json.loads(text)["results"] for text in ((output / "ablation.json").read_text(), before))
    assert ours == theirs


@pytest.mark.full
def test_other_settings_in_the_same_folder_are_refused(
    done: Path,
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = options(tiny_teacher_dir, small_corpus_dir, done / "out", task=done / "words", max_steps=3)
    line = refusal("ablation.py", command, done, monkeypatch, capfd)
    assert_names(line, "changed-run", "max_steps", "2", "3")


@pytest.mark.full
@pytest.mark.parametrize("changed", ["deepspeed_config", "corpus", "teacher", "words"])
def test_other_contents_under_the_same_paths_are_refused(
    done: Path,
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    changed: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    teacher, corpus, task, more = tiny_teacher_dir, small_corpus_dir, done / "words", {}
    if changed == "deepspeed_config":
        more = {"deepspeed_config": write_config(tmp_path / "cpu.json", {"gradient_clipping": 1.0})}
    elif changed == "corpus":
        corpus = tmp_path / "corpus"
        shutil.copytree(small_corpus_dir, corpus)
        manifest = json.loads((corpus / "manifest.json").read_text()) | {"padding_fraction": 0.5}
        (corpus / "manifest.json").write_text(json.dumps(manifest))
    elif changed == "teacher":
        teacher = tmp_path / "teacher"
        shutil.copytree(tiny_teacher_dir, teacher)
        weights = load_file(teacher / "model.safetensors")
        weights["bert.embeddings.LayerNorm.bias"][0] += 1
        save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    else:
        task = tmp_path / "words"
        shutil.copytree(done / "words", task)
        lines = (task / "dev.jsonl").read_text().replace("the list 0", "a list 0")
        (task / "dev.jsonl").write_text(lines)
    command = options(teacher, corpus, done / "out", task=task, **more)
    line = refusal("ablation.py", command, tmp_path, monkeypatch, capfd)
    assert_names(line, "changed-run", changed)


@pytest.mark.parametrize(
    ("changed", "code", "named"),
    [
        ({"variants": "without_nothing"}, "bad-argument", "without_ce"),
        ({"task": "nowhere"}, "bad-task", "nowhere"),
        ({"teacher": "no/such/folder"}, "unusable-model", "no/such/folder"),
        ({"student_layers": "0,9"}, "bad-argument", "--student_layers"),
        ({"data_dir": "nowhere"}, "not-a-corpus", "nowhere"),
        ({"seeds": 0}, "bad-argument", "--seeds"),
        ({"output_dir": "occupied"}, "output-exists", "occupied"),
        ({"output_dir": "used"}, "locked", "used"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    changed: dict[str, object],
    code: str,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").write_text("x")
    command = [*options(tiny_teacher_dir, small_corpus_dir, tmp_path / "out"), *flags(changed)]
    with alone_in(tmp_path / "used"):
        line = refusal("ablation.py", command, tmp_path, monkeypatch, capfd)
    assert_names(line, code, named)


@pytest.mark.full
def test_a_failed_training_is_one_line_with_its_reason(
    tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    command = options(tiny_teacher_dir, small_corpus_dir, tmp_path / "out", train_batch_size=9)
    result = python(ABLATION, *command)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert_names(line, "failed-step", "full", "indivisible-batch", "train.log")
