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
from distilspeed.trainer.data.masking import IGNORE_INDEX
from distilspeed.trainer.data.micro_batch import MicroBatch, labelled_micro_batch, row_token_counts
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

    objective: TrainingObjective
    losses: torch.Tensor  # float32 [labelled tokens], -log softmax(logits)[label]
    predicted: torch.Tensor  # int64 [labelled tokens], the token with the highest logit
    labels: torch.Tensor  # int64 [labelled tokens]

    def quality(self) -> TokenQuality:
        """Return the means over all labelled tokens, not over batches."""
        loss = self.losses.double().mean().item()
        perplexity = float(np.exp(loss))
        if not np.isfinite(perplexity if self.objective == "causal" else loss):
            raise NumericalError(f"the model's loss on the held-out rows is {loss}; its weights are damaged")
        accuracy = (self.predicted == self.labels).double().mean().item()
        if self.objective == "causal":
            return NextTokenQuality(loss, perplexity, accuracy, len(self.labels))
        return MaskedTokenQuality(loss, accuracy, len(self.labels))

    def agreement(self, other: "Predictions") -> float:
        """Return the share of labelled tokens for which both models predict the same token."""
        return (self.predicted == other.predicted).double().mean().item()


def held_out_quality(
    model: PreTrainedModel, corpus: Corpus, max_rows: int, batch_size: int | None = None, seed: int = 0
) -> TokenQuality:
    """Measure loss and accuracy of a language model on the first ``max_rows`` held-out rows of a corpus.

    In a masked corpus tokens are masked as in training (rare tokens preferred), so the loss is comparable with
    ``loss_mlm`` of training. The masks depend only on the corpus and the seed, so every model sees the same masks. They
    come from another random stream than those of training. In a causal corpus every next token of a document counts.
    The model keeps its device and mode.

    Args:
        batch_size: rows per forward pass; it does not affect the result. None for a default.

    Raises:
        NumericalError: the loss is not finite.
    """
    return predict_held_out(model, corpus, max_rows, batch_size, seed).quality()


@torch.inference_mode()
def predict_held_out(
    model: PreTrainedModel, corpus: Corpus, max_rows: int, batch_size: int | None, seed: int
) -> Predictions:
    """Return loss and prediction for every labelled token of the first ``max_rows`` held-out rows."""
    objective = corpus.manifest.objective
    was_training = model.training
    model.eval()
    parts = []
    for batch in held_out_batches(corpus, max_rows, batch_size or ROWS_PER_BATCH[objective], seed):
        labelled = batch.labels != IGNORE_INDEX
        logits = forward_packed(model, batch.to(model.device)).logits[labelled.to(model.device)]
        logits = logits[:, : corpus.manifest.vocab_size].float()  # a model may have more rows than tokens
        labels = batch.labels[labelled]
        losses = nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none")
        parts.append((losses.cpu(), logits.argmax(dim=-1).cpu(), labels))
    model.train(was_training)
    return Predictions(objective, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def held_out_batches(corpus: Corpus, max_rows: int, batch_size: int, seed: int) -> Iterator[MicroBatch]:
    """Yield the first ``max_rows`` held-out rows with labels; the last batch may be smaller."""
    rule, held_out = corpus_masking_rule(corpus), corpus.held_out
    real_tokens, labelled_tokens = row_token_counts(held_out, corpus.manifest.objective)
    rows = np.arange(min(max_rows, len(held_out)))
    for row_ids in np.split(rows, range(batch_size, len(rows), batch_size)):
        yield labelled_micro_batch(
            read_rows(held_out, row_ids),
            row_ids,
            np.zeros_like(row_ids),
            rule,
            EVALUATION_STREAM + seed,
            real_tokens=int(real_tokens[row_ids].sum()),
            labelled_tokens=int(labelled_tokens[row_ids].sum()),
        )
