"""A new family is one class and one entry in the registry; the rest of the project trains it unchanged."""

import shutil
from pathlib import Path

import pytest
import torch
from jobs import assert_same_end
from launcher import ranks_alone, training_flags
from madeup_family import MadeUpConfig, MadeUpFamily, MadeUpForMaskedLM
from refusals import refusal
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig
from user_errors import assert_names, raises_user_error

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.evaluation.quality import held_out_quality
from distilspeed.trainer.families import registry
from distilspeed.trainer.families.vocabulary import pad_vocabulary
from distilspeed.trainer.models.attention import SDPA, choose_attention
from distilspeed.trainer.models.loading import (
    check_fits_corpus,
    load_language_model,
    load_teacher,
    make_student,
)
from distilspeed.trainer.models.packed_forward import documents_of, forward_packed

JOB = Path(__file__).with_name("madeup_family.py")
LAYERS, STEPS = (1, 3), 2


@pytest.fixture
def is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES, MadeUpFamily()])


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path) -> Path:
    """A model of the tiny teacher's sizes, with two unused positions more."""
    folder = tmp_path_factory.mktemp("madeup_teacher")
    sizes = BertConfig.from_pretrained(tiny_teacher_dir).to_dict()
    torch.manual_seed(0)
    config = MadeUpConfig(**(sizes | {"model_type": "madeup_bert", "max_position_embeddings": 66}))
    MadeUpForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(small_corpus_dir: Path) -> Corpus:
    return open_corpus(small_corpus_dir)


def arguments(teacher: Path, corpus: Path, output: Path) -> list[object]:
    layers = ",".join(map(str, LAYERS))
    return training_flags(teacher, corpus, output, student_layers=layers, max_steps=STEPS, save_steps=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, small_corpus_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("madeup_run") / "run"
    result = ranks_alone(JOB, "train.py", *arguments(teacher_dir, small_corpus_dir, folder), ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@torch.no_grad()
@pytest.mark.usefixtures("is_registered")
def test_the_student_starts_from_the_chosen_layers(teacher_dir: Path, corpus: Corpus) -> None:
    teacher, shortened = (load_teacher(str(teacher_dir)) for _ in range(2))
    shortened.bert.encoder.layer = torch.nn.ModuleList(teacher.bert.encoder.layer[i] for i in LAYERS)
    student = make_student(teacher, LAYERS).eval()
    batch = MicroBatches(corpus, BatchEquation(4, 4, 1, 1), rank=0, seed=0)[0]
    assert type(student) is type(teacher)
    torch.testing.assert_close(forward_packed(student, batch).logits, forward_packed(shortened, batch).logits)


@torch.no_grad()
@pytest.mark.usefixtures("is_registered")
def test_packed_documents_get_the_logits_that_transformers_gives_each_alone(
    teacher_dir: Path, corpus: Corpus
) -> None:
    model = load_teacher(str(teacher_dir))
    batch = MicroBatches(corpus, BatchEquation(4, 4, 1, 1), rank=0, seed=0)[0]
    plain = AutoModelForMaskedLM.from_pretrained(teacher_dir).eval()
    pad_vocabulary(model)
    packed = forward_packed(model, batch).logits[..., : model.config.vocab_size]
    documents = 0
    for ids, numbers, logits in zip(batch.input_ids, batch.document_ids, packed, strict=True):
        for number in range(int(numbers.max()) + 1):
            alone = plain(ids[numbers == number][None]).logits[0]
            torch.testing.assert_close(logits[numbers == number], alone, rtol=1e-4, atol=1e-4)
            documents += 1
    assert documents > len(batch.input_ids)


@pytest.mark.usefixtures("is_registered")
def test_its_attention_is_timed(teacher_dir: Path, corpus: Corpus) -> None:
    model = load_teacher(str(teacher_dir))
    documents = documents_of(MicroBatches(corpus, BatchEquation(4, 4, 1, 1), rank=0, seed=0)[0])
    twice = (SDPA, SDPA)  # a single candidate is not timed
    choice = choose_attention(
        model, documents, torch.float32, torch.device("cpu"), is_trained=True, candidates=twice
    )
    assert set(choice.seconds) == {SDPA}


@pytest.mark.usefixtures("is_registered")
def test_it_limits_the_length_of_rows(teacher_dir: Path, corpus: Corpus) -> None:
    model = load_teacher(str(teacher_dir))
    check_fits_corpus("teacher", str(teacher_dir), model, corpus)
    model.config.max_position_embeddings = 65
    with raises_user_error("rows-too-long", "--seq_length 63"):
        check_fits_corpus("teacher", str(teacher_dir), model, corpus)


@pytest.mark.usefixtures("is_registered")
def test_the_trained_student_loads_and_is_evaluated(run: Path, teacher_dir: Path, corpus: Corpus) -> None:
    student = load_language_model("student", str(run / "student"))
    assert type(student) is MadeUpForMaskedLM
    assert student.config.num_hidden_layers == len(LAYERS)
    at_start = make_student(load_teacher(str(teacher_dir)), LAYERS)
    before, after = (held_out_quality(model, corpus, max_rows=16) for model in (at_start, student))
    assert after.loss < before.loss


def test_it_resumes_bitwise(run: Path, teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "student")
    shutil.rmtree(max((resumed / "checkpoints").glob("step_*")))
    result = ranks_alone(
        JOB, "train.py", *arguments(teacher_dir, small_corpus_dir, resumed), "--resume", ranks=1
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_end(resumed, run)
    first, again = ((folder / "metrics.jsonl").read_text().splitlines()[0] for folder in (run, resumed))
    assert again == first, "its times differ: the first step was taken again"


def test_without_its_entry_in_the_registry_it_is_refused(
    teacher_dir: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    line = refusal(
        "train.py", arguments(teacher_dir, small_corpus_dir, tmp_path / "run"), tmp_path, monkeypatch, capfd
    )
    assert_names(line, "unsupported-model", '"madeup_bert"', '"bert"')
    with raises_user_error("unsupported-model", '"madeup_bert"', '"bert", "distilbert"'):
        load_language_model("student", str(teacher_dir))
