"""GLUE: its files and hub data sets are read as they are, and its metrics are those of the benchmark."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
import torch
from user_errors import raises_user_error

from distilspeed.trainer.evaluation.tasks import glue
from distilspeed.trainer.evaluation.tasks.glue import Glue
from distilspeed.trainer.evaluation.tasks.glue_specs import GLUE_SPECS
from distilspeed.trainer.evaluation.tasks.names import GLUE_FOLDERS, expand_glue
from distilspeed.trainer.evaluation.tasks.registry import read_tasks
from distilspeed.trainer.evaluation.tasks.sentences import Example

# Lines in the form of GLUE's own files. The columns that are not used are shortened.
MNLI = "index promptID pairID genre s1_binary s2_binary s1_parse s2_parse sentence1 sentence2".replace(
    " ", "\t"
)
FILES = {
    "CoLA": {
        "train.tsv": ['gj04\t1\t\tShe "left.', "gj04\t0\t*\tLeft she."],
        "dev.tsv": ["gj04\t1\t\tHe\rran."],
    },
    "SST-2": {
        "train.tsv": ["sentence\tlabel", "a good film \t1", "bad \t0"],
        "dev.tsv": ["sentence\tlabel", "fine\t1"],
    },
    "MRPC": {
        "train.tsv": [
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            '1\t7\t8\tHe said "no\t"No", he said',
        ],
        "dev.tsv": ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\tA\u2028b\tC"],
    },
    "STS-B": {
        "train.tsv": ["index\tgenre\tsentence1\tsentence2\tscore", "0\tnews\tA man.\tA person.\t4.250"],
        "dev.tsv": ["index\tgenre\tsentence1\tsentence2\tscore", "0\tnews\tA.\tB.\t0"],
    },
    "QQP": {
        "train.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWhy?\tHow?\t0"],
        "dev.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWho?\tWho is it?\t1"],
    },
    "MNLI": {
        "train.tsv": [f"{MNLI}\tlabel1\tgold_label", "0\tp\tp\tg\tb\tb\tp\tp\tA.\tB.\tneutral\tneutral"],
        "dev_matched.tsv": [
            f"{MNLI}\tlabel1\tgold_label",
            "0\tp\tp\tg\tb\tb\tp\tp\tC.\tD.\tneutral\tentailment",
        ],
        "dev_mismatched.tsv": [
            f"{MNLI}\tlabel1\tgold_label",
            "0\tp\tp\tg\tb\tb\tp\tp\tE.\tF.\tneutral\tcontradiction",
        ],
    },
    "QNLI": {
        "train.tsv": ["index\tquestion\tsentence\tlabel", "0\tWho?\tHim.\tentailment"],
        "dev.tsv": ["index\tquestion\tsentence\tlabel", "0\tWhat?\tIt.\tnot_entailment"],
    },
    "RTE": {
        "train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tnot_entailment"],
        "dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tC.\tD.\tentailment"],
    },
    "WNLI": {
        "train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1"],
        "dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tC.\tD.\t0"],
    },
}
# The first training example and the dev examples.
EXAMPLES = {
    "cola": (Example('She "left.', None, 1), [Example("He\rran.", None, 1)]),
    "sst2": (Example("a good film ", None, 1), [Example("fine", None, 1)]),
    "mrpc": (Example('He said "no', '"No", he said', 1), [Example("A\u2028b", "C", 0)]),
    "stsb": (Example("A man.", "A person.", 4.25), [Example("A.", "B.", 0.0)]),
    "qqp": (Example("Why?", "How?", 0), [Example("Who?", "Who is it?", 1)]),
    "mnli": (Example("A.", "B.", 1), [Example("C.", "D.", 0), Example("E.", "F.", 2)]),
    "qnli": (Example("Who?", "Him.", 0), [Example("What?", "It.", 1)]),
    "rte": (Example("A.", "B.", 1), [Example("C.", "D.", 0)]),
    "wnli": (Example("A.", "B.", 1), [Example("C.", "D.", 0)]),
}


@pytest.fixture
def glue_dir(tmp_path: Path) -> Path:
    for folder, files in FILES.items():
        (tmp_path / folder).mkdir()
        for name, lines in files.items():
            (tmp_path / folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path


def read(name: str) -> Glue:
    (task,) = read_tasks([name])
    assert isinstance(task, Glue)
    return task


def test_glue_stands_for_its_nine_tasks_on_the_hub_or_in_a_folder(tmp_path: Path) -> None:
    assert list(expand_glue(["glue"], None)) == [f"glue/{task}" for task in GLUE_SPECS]
    assert list(expand_glue(["glue"], tmp_path)) == [
        str(tmp_path / folder) for folder in GLUE_FOLDERS.values()
    ]
    mixed = ["tasks/mine", "glue/rte", "glue/none"]
    assert list(expand_glue(mixed, None)) == mixed
    assert list(expand_glue(mixed, tmp_path)) == ["tasks/mine", str(tmp_path / "RTE"), "glue/none"]
    assert GLUE_FOLDERS.keys() == GLUE_SPECS.keys() == EXAMPLES.keys()


@pytest.mark.parametrize("task", EXAMPLES)
def test_its_own_files_are_read(glue_dir: Path, task: str) -> None:
    found = read(str(glue_dir / GLUE_FOLDERS[task]))
    first, dev = EXAMPLES[task]
    assert found.name == f"glue/{task}"
    assert found.train[0] == first
    assert list(found.dev) == dev
    assert sum(found.dev_sizes) == len(dev)
    assert not found.warnings()


@pytest.mark.parametrize("task", EXAMPLES)
def test_the_hubs_data_sets_give_the_same_examples(
    glue_dir: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a local folder of the same form: one Parquet file per configuration and split."""
    local = read(str(glue_dir / GLUE_FOLDERS[task]))
    columns = GLUE_SPECS[task].hub_sentences
    hub = glue_dir / "hub"
    first = 0
    dev = []
    for size in local.dev_sizes:
        dev.append(local.dev[first : first + size])
        first += size
    names = [dev_set.hub for dev_set in GLUE_SPECS[task].dev_sets]
    for split, examples in {"train": local.train, **dict(zip(names, dev, strict=True))}.items():
        rows = [
            dict(zip(columns, (example.text, example.pair), strict=False)) | {"label": example.label}
            for example in examples
        ]
        datasets.Dataset.from_list(rows).to_parquet(hub / task / f"{split}-00000-of-00001.parquet")
    splits = "".join(f"  - split: {split}\n    path: {task}/{split}-*\n" for split in ("train", *names))
    (hub / "README.md").write_text(f"---\nconfigs:\n- config_name: {task}\n  data_files:\n{splits}---\n")
    monkeypatch.setattr(glue, "HUB_DATASET", str(hub))
    # In the user's cache, a folder of another test run may have the same name.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", glue_dir / "cache")
    found = read(f"glue/{task}")
    assert (found.train, found.dev, found.dev_sizes) == (local.train, local.dev, local.dev_sizes)


def predictions(values: Sequence[Sequence[float]]) -> dict[str, list[torch.Tensor]]:
    return {"logits": [torch.tensor(value) for value in values]}


def test_the_two_dev_sets_of_mnli_are_scored_apart(glue_dir: Path) -> None:
    task = read(str(glue_dir / "MNLI"))
    features = [{"labels": 0}, {"labels": 2}]
    found = task.score(features, predictions([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]]))
    assert found == {"accuracy": 1.0, "accuracy_mismatched": 0.0}
    assert task.metrics == tuple(found)


def test_metrics_are_those_of_the_benchmark(glue_dir: Path) -> None:
    def score(folder: str, labels: list[float], values: list[list[float]]) -> dict[str, float]:
        task = read(str(glue_dir / folder))
        sized = Glue(**{**vars(task), "dev_sizes": (len(labels),)})
        return sized.score([{"labels": label} for label in labels], predictions(values))

    yes, no = [0.0, 1.0], [1.0, 0.0]
    # 2 true positives, 1 false positive, 1 false negative, 1 true negative
    labels, answers = [1, 1, 0, 1, 0], [yes, yes, yes, no, no]
    assert score("MRPC", labels, answers) == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    assert score("CoLA", labels, answers)["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 1) / 6)
    assert score("CoLA", [1, 0], [yes, yes])["matthews_correlation"] == 0
    found = score("STS-B", [0.0, 1.0, 2.0], [[0.0], [1.0], [8.0]])
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(8 / (2 * 38) ** 0.5)
    assert score("STS-B", [0.0, 1.0], [[2.0], [2.0]]) == {"pearson": 0, "spearman": 0}


# Folder, file, lines, and what the error names.
BAD = {
    "no column": ("RTE", "train.tsv", ["sentence1\tsentence2\tanswer", "A\tB\tentailment"], "'label'"),
    "wrong number of fields": ("SST-2", "dev.tsv", ["sentence\tlabel", "a\t1", "a\tb\t1"], "dev.tsv, line 3"),
    "unknown label": (
        "QNLI",
        "train.tsv",
        ["question\tsentence\tlabel", "a\tb\tneutral"],
        "line 2 has",
        "'neutral'",
    ),
    "no number": ("STS-B", "dev.tsv", ["sentence1\tsentence2\tscore", "a\tb\tfive"], "line 2 has", "'five'"),
    "out of range": ("STS-B", "dev.tsv", ["sentence1\tsentence2\tscore", "a\tb\t5.5"], "line 2 has", "'5.5'"),
    "a test set": ("CoLA", "dev.tsv", ["index\tsentence", "0\tHe ran."], "dev.tsv, line 1"),
    "no examples": ("MRPC", "dev.tsv", ["Quality\t#1 String\t#2 String"], "dev.tsv"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused(glue_dir: Path, name: str) -> None:
    folder, file, lines, *named = BAD[name]
    (glue_dir / folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with raises_user_error("bad-task", *named):
        read(str(glue_dir / folder))


def test_a_missing_file_and_an_unreachable_hub_are_refused(
    glue_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (glue_dir / "RTE" / "dev.tsv").unlink()
    with raises_user_error("bad-task", str(glue_dir / "RTE" / "dev.tsv")):
        read(str(glue_dir / "RTE"))
    monkeypatch.setattr(glue, "HUB_DATASET", str(glue_dir / "absent"))
    with raises_user_error("bad-task", "glue/mrpc", "--glue_dir"):
        read("glue/mrpc")


def test_few_malformed_lines_are_left_out_and_counted(glue_dir: Path) -> None:
    """QQP's own train.tsv has such lines."""
    header, line = FILES["QQP"]["train.tsv"]
    (glue_dir / "QQP" / "train.tsv").write_text("\n".join([header, *[line] * 1999, "1\t2\t3\tWhy?"]))
    task = read(str(glue_dir / "QQP"))
    assert len(task.train) == 1999
    (warning,) = task.warnings()
    assert "1 lines in train.tsv" in warning
