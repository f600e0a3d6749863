"""Tasks: their files are read and checked, and fine-tuning learns a separable task."""

import inspect
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)
from transformers.utils import ModelOutput
from user_errors import raises_user_error

from distilspeed.trainer.errors import NumericalError
from distilspeed.trainer.evaluation.fine_tuning import (
    FineTuningRun,
    fine_tune,
    model_inputs,
    parameter_groups,
)
from distilspeed.trainer.evaluation.tasks.jsonl_classification import JsonLinesClassification
from distilspeed.trainer.evaluation.tasks.jsonl_regression import JsonLinesRegression
from distilspeed.trainer.evaluation.tasks.registry import read_tasks
from distilspeed.trainer.evaluation.tasks.sentences import Example, encode
from distilspeed.trainer.evaluation.tasks.task import Batch, Feature, FineTuning, Predictions, Scores
from distilspeed.trainer.models.loading import (
    Head,
    load_language_model,
    load_teacher,
    load_with_head,
    make_student,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SINGLE = {"text": "the list is empty", "label": 0}
OTHER = {"text": "a function returns", "label": 1}


def write_task(folder: Path, train: Sequence[object], dev: Sequence[object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("dev", dev)):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def read_task(folder: Path) -> JsonLinesClassification:
    (task,) = read_tasks([str(folder)])
    assert isinstance(task, JsonLinesClassification)
    return task


def separable_task(folder: Path, train: int = 192, dev: int = 64) -> Path:
    """Write a task in which one word determines the class."""
    words = ("list", "class")
    records = [{"text": f"the {words[i % 2]} number {i // 2}", "label": i % 2} for i in range(train + dev)]
    return write_task(folder, records[:train], records[train:])


def test_sentences_and_pairs_are_read_with_their_classes(tmp_path: Path) -> None:
    pairs = [
        {"text_a": "a\u2028b", "text_b": "c", "label": "yes", "src": "x"},
        {"text_a": "d", "text_b": "e", "label": "no"},
    ]
    task = read_task(write_task(tmp_path / "pairs", pairs, pairs[:1]))
    assert (task.name, task.labels) == ("pairs", ("no", "yes"))
    assert task.train == (Example("a\u2028b", "c", 1), Example("d", "e", 0))
    single = read_task(write_task(tmp_path / "single", [SINGLE, OTHER], [SINGLE, SINGLE, OTHER]))
    assert single.dev[2] == Example("a function returns", None, 1)
    assert single.majority_accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize("unlabelled", [-1, "-1", "-"])
def test_unlabelled_examples_are_left_out(tmp_path: Path, unlabelled: int | str) -> None:
    """The labels are those of SNLI from datasets, from a CSV file, and in its own files."""
    kind = type(unlabelled)
    examples = [{"text": f"number {i}", "label": kind(i % 3)} for i in range(20)]
    for place in (0, 7):
        examples[place]["label"] = unlabelled
    task = read_task(write_task(tmp_path, examples, examples[1:]))
    assert task.labels == tuple(kind(i) for i in range(3))
    assert task.unlabelled == {"train.jsonl": 2, "dev.jsonl": 1}
    assert [example.text for example in task.dev] == [f"number {i}" for i in range(1, 20) if i != 7]
    assert [example.label for example in task.train[:3]] == [1, 2, 0]


def test_booleans_are_two_classes(tmp_path: Path) -> None:
    examples = [{"text": "a", "label": False}, {"text": "b", "label": True}]
    task = read_task(write_task(tmp_path, examples, examples))
    assert task.labels == (False, True)
    assert task.unlabelled == {"train.jsonl": 0, "dev.jsonl": 0}


def test_a_class_may_be_a_string_that_looks_like_a_number_or_version(tmp_path: Path) -> None:
    examples = [{"text": "a", "label": label} for label in ("2", "1.", "v1.5", "1.2.3", "e5", "nan")]
    assert len(read_task(write_task(tmp_path, examples, examples)).labels) == 6


def test_labels_with_a_decimal_point_are_scores(tmp_path: Path) -> None:
    examples = [{"text_a": "a", "text_b": "b", "label": 3}, {"text_a": "c", "text_b": "d", "label": 2.5}]
    (task,) = read_tasks([str(write_task(tmp_path, examples, examples[:1]))])
    assert isinstance(task, JsonLinesRegression)
    assert (task.train[1], task.dev[0]) == (Example("c", "d", 2.5), Example("a", "b", 3.0))
    features = [{"labels": 1.0}, {"labels": 2.0}, {"labels": 4.0}]
    found = task.score(features, {"logits": [torch.tensor([value]) for value in (0.0, 1.0, 3.0)]})
    assert found == pytest.approx({"pearson": 1, "spearman": 1})


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    task = read_task(write_task(tmp_path, [SINGLE, {"text": "a \ud83d b", "label": 1}], [SINGLE]))
    assert task.train[1].text == "a ? b"


@pytest.mark.parametrize("saved_with", ["bert", "distilbert"])
def test_a_model_gets_only_the_inputs_it_accepts_from_any_tokenizer(
    small_tokenizer_dir: Path, tiny_teacher_dir: Path, saved_with: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    if saved_with == "distilbert":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    teacher = load_teacher(str(tiny_teacher_dir))
    examples = (Example("the list", "a class " * 50, 1),)
    features = encode(examples, tokenizer, max_length=16)
    (of_bert,) = model_inputs(teacher, features)
    (of_distilbert,) = model_inputs(make_student(teacher, (0, 3)), features)
    assert of_bert.keys() - of_distilbert.keys() == {"token_type_ids"}
    assert of_distilbert.keys() == {"input_ids", "attention_mask", "labels"}
    assert len(of_bert["input_ids"]) == 16
    assert set(of_bert["token_type_ids"]) == {0, 1}


@pytest.mark.parametrize(
    ("architecture", "precision"), [("bert", "fp32"), ("distilbert", "fp32"), ("distilbert", "bf16")]
)
def test_a_separable_task_is_learned(
    tmp_path: Path, tiny_teacher_dir: Path, small_tokenizer_dir: Path, architecture: str, precision: str
) -> None:
    model_dir = tiny_teacher_dir
    if architecture == "distilbert":
        model_dir = tmp_path / "student"
        make_student(load_teacher(str(tiny_teacher_dir)), (0, 3)).save_pretrained(model_dir)
    task = read_task(separable_task(tmp_path / "task"))
    settings = FineTuning(epochs=6, learning_rate=2e-3, batch_size=16, max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    assert fine_tune(str(model_dir), task, tokenizer, settings, 0, CPU, precision)["accuracy"] > 0.95


def test_bf16_on_a_cpu_is_not_trained_with_the_slow_attention(
    tmp_path: Path, tiny_teacher_dir: Path, small_tokenizer_dir: Path
) -> None:
    task = read_task(separable_task(tmp_path / "task", train=4, dev=4))
    used = {}
    for precision, length in (("fp32", 32), ("bf16", 32), ("bf16", 1024)):
        model = load_with_head(str(tiny_teacher_dir), task.head)
        settings = FineTuning(epochs=1, learning_rate=1e-3, batch_size=4, max_length=length)
        tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
        FineTuningRun(task, tokenizer, settings, 0, precision).train(model)
        used[precision, length] = model.config._attn_implementation
    assert used == {("fp32", 32): "sdpa", ("bf16", 32): "eager", ("bf16", 1024): "sdpa"}


@dataclass(frozen=True)
class Contrary(JsonLinesClassification):
    """The same examples, with a loss for the other one of the two classes."""

    def loss(self, outputs: ModelOutput, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs["logits"], 1 - batch["labels"])


@dataclass(frozen=True)
class Broken(JsonLinesClassification):
    def score(self, features: Sequence[Feature], predictions: Predictions) -> Scores:
        return {"accuracy": float("nan")}


def test_training_uses_the_tasks_own_loss(
    tmp_path: Path, tiny_teacher_dir: Path, small_tokenizer_dir: Path
) -> None:
    task = Contrary.read(str(separable_task(tmp_path / "task")))
    settings = FineTuning(epochs=6, learning_rate=2e-3, batch_size=16, max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    assert fine_tune(str(tiny_teacher_dir), task, tokenizer, settings, seed=0, device=CPU)["accuracy"] < 0.05


def test_a_nan_score_ends_the_evaluation(
    tmp_path: Path, tiny_teacher_dir: Path, small_tokenizer_dir: Path
) -> None:
    task = Broken.read(str(separable_task(tmp_path / "task", train=16, dev=8)))
    settings = FineTuning(epochs=1, learning_rate=1e-3, batch_size=8, max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    with pytest.raises(NumericalError, match="on the task task with seed 3 has accuracy nan"):
        fine_tune(str(tiny_teacher_dir), task, tokenizer, settings, seed=3, device=CPU)


# Values that a config may have from another use of the model.
LEFT_OVER: dict[str, dict[str, object]] = {
    "a regression": {"problem_type": "regression", "num_labels": 1},
    "several labels an example": {"problem_type": "multi_label_classification"},
    "a kind of problem of its own": {"problem_type": "mine"},
    "three labels": {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
    "names of labels that do not exist": {"label2id": {"x": 7}},
    "one label an example": {"problem_type": "single_label_classification"},
    "another architecture": {"architectures": ["BertForTokenClassification"]},
    "outputs as tuples": {"return_dict": False},
    "more outputs": {"output_hidden_states": True, "output_attentions": True},
    "chunks": {"chunk_size_feed_forward": 7},
}


HEADS = [
    Head(AutoModelForSequenceClassification, 2, "single_label_classification"),
    Head(AutoModelForSequenceClassification, 1, "regression"),
    Head(AutoModelForTokenClassification, 9),
    Head(AutoModelForQuestionAnswering, 2),
]


def with_left_overs(folder: Path, config: dict[str, object], head: torch.Tensor | None = None) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if head is not None:
        weights = load_file(folder / "model.safetensors") | {"classifier.weight": head}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_config_values_from_another_use_of_a_model_change_nothing(
    tmp_path: Path, tiny_teacher_dir: Path, small_tokenizer_dir: Path, architecture: str
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_teacher_dir, plain)
    if architecture == "distilbert":
        make_student(load_teacher(str(tiny_teacher_dir)), (0, 3)).save_pretrained(plain)
    expected = load_language_model("model", str(plain))
    task = read_task(separable_task(tmp_path / "task", train=16, dev=8))
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    ids = torch.arange(20)[None]
    for name, config in LEFT_OVER.items():
        folder = tmp_path / name
        shutil.copytree(plain, folder)
        with_left_overs(folder, config)
        model = load_language_model("model", str(folder))
        assert torch.equal(model(ids).logits, expected(ids).logits), name
        settings = FineTuning(epochs=1, learning_rate=1e-3, batch_size=8, max_length=32)
        assert 0 <= fine_tune(str(folder), task, tokenizer, settings, 0, CPU)["accuracy"] <= 1, name


@pytest.mark.parametrize("left_over", LEFT_OVER)
def test_every_head_can_be_put_on_a_model_with_config_values_from_another_use(
    tmp_path: Path, tiny_teacher_dir: Path, left_over: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher_dir, folder)
    with_left_overs(folder, LEFT_OVER[left_over])
    for head in HEADS:
        config = load_with_head(str(folder), head).config
        assert (config.num_labels, config.problem_type) == (head.num_labels, head.problem_type)


@pytest.mark.parametrize("classes", [2, 3])
def test_every_model_gets_a_new_head_even_if_it_has_one(
    tmp_path: Path, tiny_teacher_dir: Path, classes: int
) -> None:
    with_head = tmp_path / "with_head"
    shutil.copytree(tiny_teacher_dir, with_head)
    with_left_overs(with_head, {}, head=torch.full((classes, 32), float("nan")))
    torch.manual_seed(0)
    expected = load_with_head(str(tiny_teacher_dir), HEADS[0])
    torch.manual_seed(0)
    found = load_with_head(str(with_head), HEADS[0])
    for (name, one), other in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    layer = "bert.encoder.layer.3.output.dense.weight"
    assert torch.equal(found.state_dict()[layer], load_teacher(str(tiny_teacher_dir)).state_dict()[layer])


def test_the_schedule_warms_up_and_ends_at_zero_and_the_seed_determines_the_order(
    tmp_path: Path, tiny_teacher_dir: Path, small_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    orders: list[list[int]] = []
    step, forward = torch.optim.AdamW.step, BertForSequenceClassification.forward

    def recorded_step(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        rates[-1].append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    def recorded_forward(
        self: BertForSequenceClassification, input_ids: torch.Tensor, **inputs: object
    ) -> object:
        if self.training:
            orders[-1] += input_ids.sum(dim=1).tolist()
        return forward(self, input_ids=input_ids, **inputs)

    recorded_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    monkeypatch.setattr(BertForSequenceClassification, "forward", recorded_forward)
    task = read_task(separable_task(tmp_path / "task", train=80, dev=8))
    settings = FineTuning(epochs=4, learning_rate=1e-3, batch_size=16, max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    for seed in (0, 0, 1):
        rates.append([])
        orders.append([])
        fine_tune(str(tiny_teacher_dir), task, tokenizer, settings, seed, CPU)
    # 20 steps: 2 of warm-up, then 18 down.
    expected = [0.0, 0.5e-3, *(1e-3 * (18 - i) / 18 for i in range(18))]
    assert rates[0] == pytest.approx(expected)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:80] != orders[0][80:160]
    assert sorted(orders[0][:80]) == sorted(orders[0][80:160])


def test_a_byte_order_mark_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    task = read_task(
        write_task(tmp_path, ["\ufeff" + json.dumps(SINGLE), "", json.dumps(OTHER), ""], [SINGLE])
    )
    assert [example.text for example in task.train] == [SINGLE["text"], OTHER["text"]]


@pytest.mark.parametrize("fault", ["more layers", "renamed weights", "NaN", "another width"])
def test_an_encoder_with_random_weights_is_not_fine_tuned(
    tmp_path: Path, tiny_teacher_dir: Path, fault: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher_dir, folder)
    weights, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    if fault == "more layers":
        config["num_hidden_layers"] += 1
    elif fault == "another width":
        config["intermediate_size"] *= 2
    elif fault == "renamed weights":
        weights = {f"wrapped.{name}": weight for name, weight in weights.items()}
    else:
        weights["bert.encoder.layer.0.output.dense.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with raises_user_error("damaged-model", str(folder)):
        load_with_head(str(folder), HEADS[0])


def test_biases_and_norms_do_not_decay(tiny_teacher_dir: Path) -> None:
    model = load_with_head(str(tiny_teacher_dir), Head(AutoModelForSequenceClassification, num_labels=2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, others = parameter_groups(model)
    assert decaying["weight_decay"] > others["weight_decay"] == 0
    unlike = [name for name in names.values() if name.endswith("bias") or "LayerNorm" in name]
    assert [names[id(parameter)] for parameter in others["params"]] == unlike
    assert len(decaying["params"]) + len(unlike) == len(names)
