"""Attention within documents: both implementations give the same result, and the faster one is chosen."""

from pathlib import Path

import pytest
import torch
from flash_attention import flash_attention_on_cpus
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.families.masks import EAGER, FLEX, VARLEN, Documents, document_mask
from distilspeed.trainer.models import attention
from distilspeed.trainer.models.attention import SDPA, attention_candidates, choose_attention
from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.models.packed_forward import documents_of, encode_packed
from distilspeed.trainer.models.varlen_attention import OLDEST_VARLEN_CAPABILITY, varlen_attention

CPU = torch.device("cpu")


def documents_of_row(ids: list[int]) -> Documents:
    """Return the documents of one row, without starts, which no implementation here reads."""
    return Documents(torch.tensor([ids]), torch.empty(0, dtype=torch.int32))


@pytest.fixture
def teacher(tiny_teacher_dir: Path) -> BertForMaskedLM:
    return load_teacher(str(tiny_teacher_dir))


@pytest.fixture(scope="module")
def corpus(small_corpus_dir: Path) -> Corpus:
    return open_corpus(small_corpus_dir)


def test_tokens_see_only_their_document_and_padding_sees_padding() -> None:
    mask = document_mask(documents_of_row([0, 0, 1, -1]), SDPA)
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
            documents_of(batch),
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
        module: object, name: str, states: torch.Tensor, documents: Documents
    ) -> tuple[list[torch.Tensor], float]:
        return [torch.ones(3)], 1.0 if name == fastest else 2.0

    monkeypatch.setattr(attention, "_timed_attention", timed)
    choice = choose_attention(
        teacher, documents_of_row([0] * 8), torch.float32, CPU, is_trained=True, candidates=(SDPA, FLEX)
    )
    assert choice.implementation == fastest
    assert teacher.config._attn_implementation == fastest
    assert fastest in str(choice)


@pytest.mark.parametrize("fault", ["wrong values", "a wrong gradient", "NaN", "does not run"])
def test_an_implementation_that_is_wrong_or_fails_is_not_chosen(
    teacher: BertForMaskedLM, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def timed(
        module: object, name: str, states: torch.Tensor, documents: Documents
    ) -> tuple[list[torch.Tensor], float]:
        if name == FLEX and fault == "does not run":
            raise RuntimeError("no kernel")
        values = [torch.ones(3), torch.ones(3)]
        if name == FLEX:
            values[fault == "a wrong gradient"] *= torch.nan if fault == "NaN" else 1.1
        return values, 0.1 if name == FLEX else 1.0

    monkeypatch.setattr(attention, "_timed_attention", timed)
    choice = choose_attention(
        teacher, documents_of_row([0] * 8), torch.float32, CPU, is_trained=False, candidates=(SDPA, FLEX)
    )
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
    choice = choose_attention(teacher, documents_of_row([0] * length), dtype, CPU, is_trained)
    assert (choice.implementation, choice.seconds) == (implementation, {})


@pytest.mark.parametrize(
    ("capability", "dtype", "dropout", "candidates"),
    [
        ((7, 0), torch.float16, 0.0, (SDPA,)),
        ((8, 0), torch.float32, 0.1, (SDPA,)),
        ((8, 0), torch.float32, 0.0, (SDPA, FLEX)),
        ((8, 0), torch.float16, 0.1, (SDPA, VARLEN)),
        ((9, 0), torch.bfloat16, 0.0, (SDPA, VARLEN, FLEX)),
    ],
)
def test_a_gpu_is_offered_what_it_can_run(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    dropout: float,
    candidates: tuple[str, ...],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention_candidates(torch.device("cuda"), dtype, 512, dropout, is_trained=True) == candidates


def test_flash_attention_drops_in_training_only(tiny_teacher_dir: Path, corpus: Corpus) -> None:
    config = BertConfig.from_pretrained(tiny_teacher_dir, attention_probs_dropout_prob=0.25)
    student = make_student(BertForMaskedLM(config), (0, 3))
    student.set_attn_implementation(VARLEN)
    batch = MicroBatches(corpus, BatchEquation(6, 6, 1, 1), rank=0, seed=0)[0]
    with flash_attention_on_cpus() as dropouts:
        encode_packed(student.train(), batch)
        encode_packed(student.eval(), batch)
    assert dropouts == [0.25, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("is_causal", [False, True])
def test_pytorchs_operator_takes_the_arguments_and_has_a_gradient(is_causal: bool) -> None:
    """The meta device checks arguments and shapes with PyTorch's own operator."""
    layer = nn.Module()
    layer.is_causal = is_causal
    states = torch.randn(3, 12, 64, 32, dtype=torch.float16, device="meta", requires_grad=True)
    starts = torch.zeros(1, 1, 1, 10, dtype=torch.int32, device="meta")
    output, _ = varlen_attention(
        layer, states, states, states, starts, dropout=0.1, scaling=0.2, sliding_window=9
    )
    assert (output.shape, output.dtype) == ((3, 64, 12, 32), torch.float16)
    output.sum().backward()
    assert states.grad.shape == states.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_trained", [False, True])
def test_a_gpu_computes_the_same_with_flash_attention(
    tiny_teacher_dir: Path, corpus: Corpus, dtype: torch.dtype, is_trained: bool
) -> None:
    gpu = torch.device("cuda")
    if torch.cuda.get_device_capability(gpu) < OLDEST_VARLEN_CAPABILITY:
        pytest.skip("flash attention needs compute capability 8.0")
    # The kernel needs heads of at least 8.
    config = BertConfig.from_pretrained(
        tiny_teacher_dir, num_attention_heads=2, attention_probs_dropout_prob=0.1
    )
    batch = MicroBatches(corpus, BatchEquation(6, 6, 1, 1), rank=0, seed=0)[0]
    choice = choose_attention(BertForMaskedLM(config), documents_of(batch), dtype, gpu, is_trained)
    assert VARLEN in choice.seconds
