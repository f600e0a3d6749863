"""The measurements: exact, with the same inputs for every model, and each parameter counted once."""

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM
from vocabularies import with_rows

from distilspeed.trainer.corpus.format import Corpus, open_corpus, read_rows
from distilspeed.trainer.data.batches import corpus_masking_rule
from distilspeed.trainer.data.masking import mask_rows
from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.errors import NumericalError
from distilspeed.trainer.evaluation import quality
from distilspeed.trainer.evaluation.latency import count_parameters, measure_latency, weights_bytes
from distilspeed.trainer.evaluation.quality import (
    held_out_batches,
    held_out_quality,
    predict_held_out,
)
from distilspeed.trainer.evaluation.report import Latency
from distilspeed.trainer.models.packed_forward import ModelOutputs

ROWS = 13


@pytest.fixture(scope="module")
def corpus(small_corpus_dir: Path) -> Corpus:
    return open_corpus(small_corpus_dir)


def tiny_model(corpus: Corpus, seed: int = 0, **options: Any) -> BertForMaskedLM:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=corpus.manifest.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,  # far from uniform predictions, so that a wrong input shows
        max_position_embeddings=64,
        **options,
    )
    return BertForMaskedLM._from_config(config, attn_implementation="sdpa").eval()


class Oracle:
    """Replaces ``forward_packed``: records its inputs and predicts the true tokens."""

    def __init__(self, corpus: Corpus) -> None:
        self.truth = torch.from_numpy(read_rows(corpus.held_out, range(ROWS)).input_ids)
        self.vocab_size = corpus.manifest.vocab_size
        self.seen: list[torch.Tensor] = []

    def __call__(self, model: nn.Module, batch: MicroBatch) -> ModelOutputs:
        self.seen.append(batch.input_ids)
        logits = 30.0 * nn.functional.one_hot(self.truth[batch.row_ids], self.vocab_size)
        return ModelOutputs(logits, logits, {})


def test_quality_equals_that_of_every_document_run_alone_in_float64(corpus: Corpus) -> None:
    model = tiny_model(corpus)
    exact = copy.deepcopy(model).double()
    losses, hits = [], []
    for batch in held_out_batches(corpus, ROWS, batch_size=1, seed=3):
        for document in range(int(batch.document_ids.max()) + 1):
            inside = batch.document_ids[0] == document
            labels = batch.labels[0, inside]
            with torch.no_grad():
                logits = exact(input_ids=batch.input_ids[:, inside]).logits[0]
            for token_logits, label in zip(logits, labels, strict=True):
                if label >= 0:
                    probability = token_logits[label].exp() / token_logits.exp().sum()
                    losses.append(-probability.log().item())
                    hits.append(token_logits.argmax() == label)
    quality = held_out_quality(model, corpus, ROWS, batch_size=4, seed=3)
    assert quality.masked_tokens == len(losses)
    assert quality.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert quality.accuracy == pytest.approx(np.mean(hits), abs=1e-12)


def test_rows_beyond_the_tokenizer_do_not_change_the_quality(corpus: Corpus) -> None:
    model = tiny_model(corpus)
    plain, wider = (
        predict_held_out(each, corpus, ROWS, batch_size=4, seed=0) for each in (model, with_rows(model, 1024))
    )
    assert torch.equal(wider.predicted, plain.predicted)
    assert wider.agreement(plain) == 1.0
    torch.testing.assert_close(wider.losses, plain.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_quality_does_not_depend_on_the_batch_size(corpus: Corpus, batch_size: int) -> None:
    model = tiny_model(corpus)
    one, other = (held_out_quality(model, corpus, ROWS, size) for size in (4, batch_size))
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert (other.accuracy, other.masked_tokens) == (one.accuracy, one.masked_tokens)


def test_a_model_that_knows_every_token_scores_all_of_them(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "forward_packed", Oracle(corpus))
    found = held_out_quality(tiny_model(corpus), corpus, ROWS)
    assert found.accuracy == 1.0
    assert found.loss < 1e-6


def test_every_model_sees_the_same_masks_for_any_global_random_state(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Oracle(corpus), Oracle(corpus)
    for oracle, batch_size in ((one, 4), (other, 3)):
        torch.manual_seed(batch_size)
        np.random.seed(batch_size)
        monkeypatch.setattr(quality, "forward_packed", oracle)
        held_out_quality(tiny_model(corpus, seed=batch_size), corpus, ROWS, batch_size=batch_size)
    assert torch.equal(torch.cat(one.seen), torch.cat(other.seen))


def test_masks_depend_on_the_seed_and_differ_from_those_of_training(corpus: Corpus) -> None:
    def labels(seed: int) -> torch.Tensor:
        return torch.cat([batch.labels for batch in held_out_batches(corpus, ROWS, 4, seed)])

    rule = corpus_masking_rule(corpus)
    stored = read_rows(corpus.held_out, range(ROWS))
    real_tokens = np.array([lengths.sum() for lengths in stored.document_lengths])
    rows = np.arange(ROWS)
    _, as_in_training = mask_rows(stored.input_ids, real_tokens, rule, 0, np.zeros_like(rows), rows)
    assert not torch.equal(labels(0), labels(1))
    # Two independent draws of 15 % share more than 15 % of their positions, because both prefer rare tokens.
    both = (labels(0).numpy() >= 0) & (as_in_training >= 0)
    assert both.sum() < 0.6 * (as_in_training >= 0).sum()


def test_fifteen_percent_of_the_requested_rows_are_masked(corpus: Corpus) -> None:
    batches = list(held_out_batches(corpus, 10_000, 4, seed=0))
    labels = torch.cat([batch.labels for batch in batches])
    truth = torch.from_numpy(read_rows(corpus.held_out, range(len(corpus.held_out))).input_ids)
    masked = labels >= 0
    assert torch.equal(labels[masked], truth[masked])
    assert not np.isin(labels[masked], corpus.manifest.special_ids).any()
    assert masked.sum() / sum(batch.real_tokens for batch in batches) == pytest.approx(0.15, abs=0.01)
    # As in training, rare tokens are preferred: the most frequent tokens are masked less often than they occur.
    common = torch.from_numpy(np.argsort(-corpus.token_counts)[:20])
    maskable = ~torch.isin(truth, torch.tensor(corpus.manifest.special_ids))
    share_masked, share_there = (
        torch.isin(truth[of], common).double().mean().item() for of in (masked, maskable)
    )
    assert share_masked < 0.5 * share_there
    assert sum(len(batch.row_ids) for batch in held_out_batches(corpus, 5, 4, seed=0)) == 5


def test_the_model_keeps_its_mode_and_gets_no_gradient(corpus: Corpus) -> None:
    model = tiny_model(corpus, hidden_dropout_prob=0.5)
    in_eval = held_out_quality(model, corpus, ROWS)
    assert not model.training
    assert held_out_quality(model.train(), corpus, ROWS) == in_eval
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_agreement_counts_equal_predictions(corpus: Corpus) -> None:
    one, other = (predict_held_out(tiny_model(corpus, seed), corpus, ROWS, 4, 0) for seed in (0, 1))
    same = sum(a == b for a, b in zip(one.predicted.tolist(), other.predicted.tolist(), strict=True))
    assert one.agreement(one) == 1.0
    assert one.agreement(other) == same / len(one.labels)


def test_a_model_with_damaged_weights_raises_a_numerical_error(corpus: Corpus) -> None:
    model = tiny_model(corpus)
    nn.init.constant_(model.bert.embeddings.LayerNorm.weight, float("nan"))
    with pytest.raises(NumericalError, match="nan"):
        held_out_quality(model, corpus, ROWS)


def test_each_shared_parameter_counts_once(corpus: Corpus) -> None:
    tied, untied = tiny_model(corpus), tiny_model(corpus, tie_word_embeddings=False)
    vocab, hidden = corpus.manifest.vocab_size, 32
    assert count_parameters(untied) - count_parameters(tied) >= vocab * hidden
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * 64 + 64 + hidden + 4 * hidden
    embeddings = (vocab + 64 + 2) * hidden + 2 * hidden
    head = hidden * hidden + hidden + 2 * hidden + vocab
    assert count_parameters(tied) == embeddings + 2 * layer + head


def test_size_on_disk_counts_only_the_weights(corpus: Corpus, tmp_path: Path) -> None:
    tiny_model(corpus).save_pretrained(tmp_path)
    (tmp_path / "notes.bin").write_bytes(bytes(1000))
    assert weights_bytes(str(tmp_path)) == (tmp_path / "model.safetensors").stat().st_size


class SleepingModel(nn.Module):
    """A model whose encoder takes a known time and records its calls."""

    config = BertConfig()

    def __init__(self, name: str, seconds: float, calls: list[str]) -> None:
        super().__init__()
        self.name, self.seconds, self.calls = name, seconds, calls

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, **_: torch.Tensor) -> None:
        self.calls.append(self.name)
        time.sleep(self.seconds)


def test_latency_is_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilspeed.trainer.evaluation.latency.SECONDS_PER_MODEL", 0.2)
    calls: list[str] = []
    models = [SleepingModel("slow", 0.02, calls), SleepingModel("fast", 0.005, calls)]
    slow, fast = measure_latency(models, torch.ones(1, 8, dtype=torch.int64), torch.device("cpu"))
    assert len(slow) == len(fast) >= 10
    assert calls == ["slow", "fast"] * (len(calls) // 2)
    assert slow.min() >= 20
    assert fast.min() >= 5
    assert Latency.of("CPU", fast, slow).speed_up == pytest.approx(np.median(slow) / np.median(fast))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quality_and_latency_on_a_gpu(corpus: Corpus) -> None:
    model, gpu = tiny_model(corpus), torch.device("cuda")
    on_cpu = held_out_quality(model, corpus, ROWS)
    (times,) = measure_latency([model], torch.ones(1, 64, dtype=torch.int64), gpu)
    assert (times > 0).all()
    assert held_out_quality(model, corpus, ROWS).loss == pytest.approx(on_cpu.loss, rel=1e-4)
