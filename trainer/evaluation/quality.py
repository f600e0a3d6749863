"""Measure the quality of a language model on held-out rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, read_rows
from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.data.batches import corpus_masking_rule
from distilspeed.trainer.data.masking import IGNORE_INDEX, MaskingRule
from distilspeed.trainer.data.micro_batch import (
    MicroBatch,
    labelled_micro_batch,
    most_documents,
    row_token_counts,
)
from distilspeed.trainer.errors import NumericalError
from distilspeed.trainer.evaluation.token_quality import MaskedTokenQuality, NextTokenQuality, TokenQuality
from distilspeed.trainer.models.packed_forward import forward_packed

# A causal model has logits at every token: 50,257 each for GPT-2.
ROWS_PER_BATCH: dict[TrainingObjective, int] = {"masked": 8, "causal": 2}
# Added to the seed, so that the key differs from every training run's: seeds of training are below 2^32.
EVALUATION_STREAM = 1 << 62


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for every masked or next token, in the order of the rows, on the CPU."""

    losses: torch.Tensor  # float32 [labelled tokens], -log softmax(logits)[label]
    predicted: torch.Tensor  # int64 [labelled tokens], the token with the highest logit
    labels: torch.Tensor  # int64 [labelled tokens]

    @property
    def loss(self) -> float:
        """The mean over all labelled tokens, not over batches."""
        return self.losses.double().mean().item()

    @property
    def accuracy(self) -> float:
        """The share of labelled tokens that are predicted."""
        return (self.predicted == self.labels).double().mean().item()

    def agreement(self, other: "Predictions") -> float:
        """Return the share of labelled tokens for which both models predict the same token."""
        return (self.predicted == other.predicted).double().mean().item()


def held_out_quality(
    model: PreTrainedModel, corpus: Corpus, max_rows: int, batch_size: int | None = None, seed: int = 0
) -> TokenQuality:
    """Return the quality of :func:`measure_held_out` without the predictions."""
    return measure_held_out(model, corpus, max_rows, batch_size, seed)[0]


def measure_held_out(
    model: PreTrainedModel, corpus: Corpus, max_rows: int, batch_size: int | None = None, seed: int = 0
) -> tuple[TokenQuality, Predictions]:
    """Measure loss and accuracy of a language model on held-out rows, evenly spread over the corpus.

    In a masked corpus 15 % of the tokens are masked, drawn uniformly as in the literature. The same rows are measured
    again with the masks of training, which prefer rare tokens; that loss is comparable with ``loss_mlm``. The masks
    depend only on the corpus and the seed, so every model sees the same masks. They come from another random stream
    than those of training. In a causal corpus every next token of a document counts. The model keeps its device and
    mode.

    Args:
        max_rows: the number of rows, if the corpus has so many.
        batch_size: rows per forward pass; it does not affect the result. None for a default.

    Returns:
        the quality, and the predictions for the uniformly masked or next tokens.

    Raises:
        NumericalError: the loss is not finite.
    """
    rule = corpus_masking_rule(corpus)
    found = predict_held_out(model, corpus, rule and rule.uniform(), max_rows, batch_size, seed)
    if rule is None:
        perplexity = float(np.exp(found.loss))
        _check_finite(perplexity, found.loss)
        return NextTokenQuality(found.loss, perplexity, found.accuracy, len(found.labels)), found
    in_training = predict_held_out(model, corpus, rule, max_rows, batch_size, seed)
    for loss in (found.loss, in_training.loss):
        _check_finite(loss, loss)
    quality = MaskedTokenQuality(
        loss=found.loss,
        accuracy=found.accuracy,
        masked_tokens=len(found.labels),
        training_masks_loss=in_training.loss,
        training_masks_accuracy=in_training.accuracy,
    )
    return quality, found


def _check_finite(value: float, loss: float) -> None:
    if not np.isfinite(value):
        raise NumericalError(f"the model's loss on the held-out rows is {loss}; its weights are damaged")


@torch.inference_mode()
def predict_held_out(
    model: PreTrainedModel,
    corpus: Corpus,
    rule: MaskingRule | None,
    max_rows: int,
    batch_size: int | None,
    seed: int,
) -> Predictions:
    """Return loss and prediction for every labelled token of at most ``max_rows`` held-out rows.

    Args:
        rule: how to mask; None for a causal corpus.
    """
    batch_size = batch_size or ROWS_PER_BATCH[corpus.manifest.objective]
    was_training = model.training
    model.eval()
    parts = []
    for batch in held_out_batches(corpus, rule, max_rows, batch_size, seed):
        labelled = batch.labels != IGNORE_INDEX
        logits = forward_packed(model, batch.to(model.device)).logits[labelled.to(model.device)]
        logits = logits[:, : corpus.manifest.vocab_size].float()  # a model may have more rows than tokens
        labels = batch.labels[labelled]
        losses = nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none")
        parts.append((losses.cpu(), logits.argmax(dim=-1).cpu(), labels))
    model.train(was_training)
    return Predictions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def held_out_batches(
    corpus: Corpus, rule: MaskingRule | None, max_rows: int, batch_size: int, seed: int
) -> Iterator[MicroBatch]:
    """Yield at most ``max_rows`` held-out rows with labels; the last batch may be smaller.

    The rows are evenly spread, because they are in the order of the sources: each source has its share.
    """
    held_out = corpus.held_out
    real_tokens, labelled_tokens = row_token_counts(held_out, corpus.manifest.objective)
    most = most_documents(held_out)
    count = min(max_rows, len(held_out))
    rows = np.arange(count) * len(held_out) // count
    for row_ids in np.split(rows, range(batch_size, len(rows), batch_size)):
        yield labelled_micro_batch(
            read_rows(held_out, row_ids),
            row_ids,
            np.zeros_like(row_ids),
            rule,
            EVALUATION_STREAM + seed,
            real_tokens=int(real_tokens[row_ids].sum()),
            labelled_tokens=int(labelled_tokens[row_ids].sum()),
            most_documents=most,
        )
