"""The measurements: exact, with the same inputs for every model, and each parameter counted once."""

import copy
import itertools
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
from distilspeed.trainer.data.masking import MaskingRule, mask_rows
from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.errors import NumericalError
from distilspeed.trainer.evaluation import quality
from distilspeed.trainer.evaluation.latency import (
    Latency,
    count_parameters,
    headline_latencies,
    latency_inputs,
    measure_latency,
)
from distilspeed.trainer.evaluation.quality import (
    held_out_batches,
    held_out_quality,
    measure_held_out,
    predict_held_out,
)
from distilspeed.trainer.evaluation.token_quality import MaskedTokenQuality
from distilspeed.trainer.models.packed_forward import ModelOutputs

ROWS = 13


@pytest.fixture(scope="module")
def corpus(small_corpus_dir: Path) -> Corpus:
    return open_corpus(small_corpus_dir)


@pytest.fixture(scope="module")
def rule(corpus: Corpus) -> MaskingRule:
    """The masks of training, which prefer rare tokens."""
    found = corpus_masking_rule(corpus)
    assert found is not None
    return found


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
        self.truth = torch.from_numpy(read_rows(corpus.held_out, range(len(corpus.held_out))).input_ids)
        self.vocab_size = corpus.manifest.vocab_size
        self.seen: list[torch.Tensor] = []

    def __call__(self, model: nn.Module, batch: MicroBatch) -> ModelOutputs:
        self.seen.append(batch.input_ids)
        logits = 30.0 * nn.functional.one_hot(self.truth[batch.row_ids], self.vocab_size)
        return ModelOutputs(logits, logits, {})


def exact_quality(model: BertForMaskedLM, corpus: Corpus, rule: MaskingRule) -> tuple[float, float, int]:
    """Return loss, accuracy and number of masked tokens, from every document run alone in float64."""
    exact = copy.deepcopy(model).double()
    losses, hits = [], []
    for batch in held_out_batches(corpus, rule, ROWS, batch_size=1, seed=3):
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
    return float(np.mean(losses)), float(np.mean(hits)), len(losses)


def test_quality_equals_that_of_every_document_run_alone_in_float64(
    corpus: Corpus, rule: MaskingRule
) -> None:
    model = tiny_model(corpus)
    found = held_out_quality(model, corpus, ROWS, batch_size=4, seed=3)
    assert isinstance(found, MaskedTokenQuality)
    loss, accuracy, tokens = exact_quality(model, corpus, rule.uniform())
    assert found.masked_tokens == tokens
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.accuracy == pytest.approx(accuracy, abs=1e-12)
    loss, accuracy, tokens = exact_quality(model, corpus, rule)
    assert found.masked_tokens == tokens
    assert found.training_masks_loss == pytest.approx(loss, rel=1e-5)
    assert found.training_masks_accuracy == pytest.approx(accuracy, abs=1e-12)
    assert found.training_masks_loss != found.loss


def test_rows_beyond_the_tokenizer_do_not_change_the_quality(corpus: Corpus, rule: MaskingRule) -> None:
    model = tiny_model(corpus)
    plain, wider = (
        predict_held_out(each, corpus, rule, ROWS, batch_size=4, seed=0)
        for each in (model, with_rows(model, 1024))
    )
    assert torch.equal(wider.predicted, plain.predicted)
    assert wider.agreement(plain) == 1.0
    torch.testing.assert_close(wider.losses, plain.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_quality_does_not_depend_on_the_batch_size(corpus: Corpus, batch_size: int) -> None:
    model = tiny_model(corpus)
    one, other = (held_out_quality(model, corpus, ROWS, size) for size in (4, batch_size))
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.training_masks_loss == pytest.approx(one.training_masks_loss, rel=1e-6)
    assert (other.accuracy, other.masked_tokens) == (one.accuracy, one.masked_tokens)


def test_a_model_that_knows_every_token_scores_all_of_them(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "forward_packed", Oracle(corpus))
    found = held_out_quality(tiny_model(corpus), corpus, ROWS)
    assert found.accuracy == found.training_masks_accuracy == 1.0
    assert max(found.loss, found.training_masks_loss) < 1e-6


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


def test_masks_depend_on_the_seed_and_differ_from_those_of_training(
    corpus: Corpus, rule: MaskingRule
) -> None:
    def labels(seed: int) -> torch.Tensor:
        return torch.cat([batch.labels for batch in held_out_batches(corpus, rule, ROWS, 4, seed)])

    stored = read_rows(corpus.held_out, range(ROWS))
    real_tokens = np.array([lengths.sum() for lengths in stored.document_lengths])
    rows = np.arange(ROWS)
    _, as_in_training = mask_rows(stored.input_ids, real_tokens, rule, 0, np.zeros_like(rows), rows)
    assert not torch.equal(labels(0), labels(1))
    # Two independent draws of 15 % share more than 15 % of their positions, because both prefer rare tokens.
    both = (labels(0).numpy() >= 0) & (as_in_training >= 0)
    assert both.sum() < 0.6 * (as_in_training >= 0).sum()


@pytest.mark.parametrize("is_uniform", [True, False])
def test_fifteen_percent_of_the_requested_rows_are_masked(
    corpus: Corpus, rule: MaskingRule, is_uniform: bool
) -> None:
    drawn = rule.uniform() if is_uniform else rule
    batches = [batch for seed in range(10) for batch in held_out_batches(corpus, drawn, 10_000, 4, seed)]
    labels = torch.cat([batch.labels for batch in batches])
    inputs = torch.cat([batch.input_ids for batch in batches])
    truth = torch.from_numpy(read_rows(corpus.held_out, range(len(corpus.held_out))).input_ids).repeat(10, 1)
    masked = labels >= 0
    assert torch.equal(labels[masked], truth[masked])
    assert torch.equal(inputs[~masked], truth[~masked])
    assert not np.isin(labels[masked], corpus.manifest.special_ids).any()
    assert masked.sum() / sum(batch.real_tokens for batch in batches) == pytest.approx(0.15, abs=0.01)
    is_mask, is_kept = inputs[masked] == corpus.manifest.mask_id, inputs[masked] == labels[masked]
    assert is_mask.double().mean() == pytest.approx(0.8, abs=0.02)
    assert is_kept.double().mean() == pytest.approx(0.1, abs=0.015)
    # Uniform masks have every token as often as the text; in training the most frequent ones are masked less often.
    common = torch.from_numpy(np.argsort(-corpus.token_counts)[:20])
    maskable = ~torch.isin(truth, torch.tensor(corpus.manifest.special_ids))
    share_masked, share_there = (
        torch.isin(truth[of], common).double().mean().item() for of in (masked, maskable)
    )
    assert (
        share_masked == pytest.approx(share_there, abs=0.01)
        if is_uniform
        else share_masked < 0.5 * share_there
    )
    assert sum(len(batch.row_ids) for batch in held_out_batches(corpus, drawn, 5, 4, seed=0)) == 5


def test_the_model_keeps_its_mode_and_gets_no_gradient(corpus: Corpus) -> None:
    model = tiny_model(corpus, hidden_dropout_prob=0.5)
    in_eval = held_out_quality(model, corpus, ROWS)
    assert not model.training
    assert held_out_quality(model.train(), corpus, ROWS) == in_eval
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_agreement_counts_equal_predictions(corpus: Corpus) -> None:
    (of_one, one), (_, other) = (measure_held_out(tiny_model(corpus, seed), corpus, ROWS) for seed in (0, 1))
    assert one.accuracy == of_one.accuracy  # the uniform masks
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
    monkeypatch.setattr("distilspeed.trainer.evaluation.latency.SECONDS", 0.2)
    calls: list[str] = []
    models = [SleepingModel("slow", 0.02, calls), SleepingModel("fast", 0.005, calls)]
    slow, fast = measure_latency(models, torch.ones(1, 8, dtype=torch.int64), torch.device("cpu"))
    assert len(slow) == len(fast) >= 3
    assert calls == ["slow", "fast"] * (len(calls) // 2)
    assert slow.min() >= 20
    assert fast.min() >= 5


def test_a_pass_longer_than_the_time_limit_is_repeated_three_times_after_one_to_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distilspeed.trainer.evaluation.latency.WARM_UP_SECONDS", 0.001)
    monkeypatch.setattr("distilspeed.trainer.evaluation.latency.SECONDS", 0.001)
    calls: list[str] = []
    (times,) = measure_latency(
        [SleepingModel("slow", 0.01, calls)], torch.ones(32, 8, dtype=torch.int64), torch.device("cpu")
    )
    assert (len(times), len(calls)) == (3, 4)


@pytest.mark.parametrize(
    ("positions", "lengths"), [(512, [32, 128, 512]), (514, [32, 128, 512]), (130, [32, 128]), (20, [20])]
)
def test_latency_inputs_are_real_tokens_of_the_lengths_that_fit(
    corpus: Corpus, positions: int, lengths: list[int]
) -> None:
    inputs = latency_inputs(corpus, positions)
    assert [tuple(ids.shape) for ids in inputs] == [
        (batch, length) for batch in (1, 32) for length in lengths
    ]
    stored = read_rows(corpus.held_out, range(len(corpus.held_out)))
    real = np.concatenate(
        [ids[: of.sum()] for ids, of in zip(stored.input_ids, stored.document_lengths, strict=True)]
    )
    assert len(real) < 32 * 512  # the corpus is so small that its tokens are repeated
    for ids in inputs:
        assert ids.flatten().tolist() == np.resize(real, ids.numel()).tolist()


def test_the_headline_is_one_sequence_of_128_tokens_or_the_longest_that_fits() -> None:
    def settings(*lengths: int) -> list[Latency]:
        return [
            Latency.of(device, (batch, length), np.ones(3), np.ones(3))
            for device in ("CPU", "GPU")
            for batch in (1, 32)
            for length in lengths
        ]

    for lengths, headline in (((32, 128, 512), 128), ((32,), 32), ((20,), 20)):
        found = headline_latencies(settings(*lengths))
        assert [(latency.device, latency.batch_size, latency.length) for latency in found] == [
            ("CPU", 1, headline),
            ("GPU", 1, headline),
        ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quality_and_latency_on_a_gpu(corpus: Corpus) -> None:
    model, gpu = tiny_model(corpus), torch.device("cuda")
    on_cpu = held_out_quality(model, corpus, ROWS)
    for input_ids in latency_inputs(corpus, 64):
        (times,) = measure_latency([model], input_ids, gpu)
        assert (times > 0).all()
    assert held_out_quality(model, corpus, ROWS).loss == pytest.approx(on_cpu.loss, rel=1e-4)


def test_the_rows_are_spread_over_the_corpus_because_they_are_in_the_order_of_its_sources(
    corpus: Corpus, rule: MaskingRule
) -> None:
    held_out = len(corpus.held_out)
    for count in (1, 3, held_out - 1, held_out, held_out + 9):
        batches = held_out_batches(corpus, rule, count, batch_size=2, seed=0)
        found = [int(row) for batch in batches for row in batch.row_ids]
        assert len(set(found)) == len(found) == min(count, held_out)
        ends = [*found, held_out]
        gaps = [end - start for start, end in itertools.pairwise(ends)]
        assert found[0] == 0
        assert max(gaps) - min(gaps) <= 1
