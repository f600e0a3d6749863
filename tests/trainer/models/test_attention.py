"""Attention within documents: both implementations give the same result, and the faster one is chosen."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.families.masks import EAGER, FLEX, document_mask
from distilspeed.trainer.models import attention
from distilspeed.trainer.models.attention import SDPA, choose_attention
from distilspeed.trainer.models.loading import load_teacher
from distilspeed.trainer.models.packed_forward import encode_packed

CPU = torch.device("cpu")


@pytest.fixture
def teacher(tiny_teacher_dir: Path) -> BertForMaskedLM:
    return load_teacher(str(tiny_teacher_dir))


@pytest.fixture(scope="module")
def corpus(small_corpus_dir: Path) -> Corpus:
    return open_corpus(small_corpus_dir)


def test_tokens_see_only_their_document_and_padding_sees_padding() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, -1]]), SDPA)
    assert mask.tolist() == [
        [
            [
                [True, True, False, False],
                [True, True, False, False],
                [False, False, True, False],
                [False, False, False, True],
            ]
        ]
    ]


@pytest.mark.usefixtures("fresh_compiler")
def test_flex_attention_gives_the_same_as_sdpa(tiny_teacher_dir: Path, corpus: Corpus, device: str) -> None:
    torch.manual_seed(0)
    # On a GPU, flex_attention needs a head size of at least 16.
    config = BertConfig.from_pretrained(tiny_teacher_dir, num_attention_heads=2)
    teacher = BertForMaskedLM(config).eval()
    batch = MicroBatches(corpus, BatchEquation(6, 6, 1, 1), rank=0, seed=0)[0].to(torch.device(device))
    teacher.to(device)
    with torch.no_grad():
        expected = encode_packed(teacher, batch)
        choice = choose_attention(
            teacher,
            batch.document_ids,
            torch.float32,
            torch.device(device),
            is_trained=False,
            candidates=(SDPA, FLEX),
        )
        assert set(choice.seconds) == {SDPA, FLEX}, "flex_attention failed or gave other values"
        teacher.set_attn_implementation(FLEX)
        torch.testing.assert_close(encode_packed(teacher, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fastest", [SDPA, FLEX])
def test_the_fastest_implementation_is_chosen(
    teacher: BertForMaskedLM, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    def timed(
        module: object, name: str, states: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        return torch.ones(3), 1.0 if name == fastest else 2.0

    monkeypatch.setattr(attention, "_timed_attention", timed)
    ids = torch.zeros(2, 8, dtype=torch.long)
    choice = choose_attention(teacher, ids, torch.float32, CPU, is_trained=True, candidates=(SDPA, FLEX))
    assert choice.implementation == fastest
    assert teacher.config._attn_implementation == fastest
    assert fastest in str(choice)


@pytest.mark.parametrize("fault", ["wrong values", "does not run"])
def test_an_implementation_that_is_wrong_or_fails_is_not_chosen(
    teacher: BertForMaskedLM, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def timed(
        module: object, name: str, states: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        if name == FLEX and fault == "does not run":
            raise RuntimeError("no kernel")
        return torch.ones(3) * (1.1 if name == FLEX else 1.0), 0.1 if name == FLEX else 1.0

    monkeypatch.setattr(attention, "_timed_attention", timed)
    ids = torch.zeros(2, 8, dtype=torch.long)
    choice = choose_attention(teacher, ids, torch.float32, CPU, is_trained=False, candidates=(SDPA, FLEX))
    assert choice.implementation == SDPA


@pytest.mark.parametrize(
    ("dtype", "length", "is_trained", "implementation"),
    [
        (torch.float32, 512, True, SDPA),
        (torch.bfloat16, 512, False, SDPA),
        (torch.bfloat16, 512, True, EAGER),
        (torch.bfloat16, 513, True, SDPA),
    ],
)
def test_on_cpus_there_is_nothing_to_measure(
    teacher: BertForMaskedLM, dtype: torch.dtype, length: int, is_trained: bool, implementation: str
) -> None:
    ids = torch.zeros(1, length, dtype=torch.long)
    choice = choose_attention(teacher, ids, dtype, CPU, is_trained)
    assert (choice.implementation, choice.seconds) == (implementation, {})
