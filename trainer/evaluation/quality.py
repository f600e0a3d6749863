"""The quality of a masked language model on held-out rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, read_rows
from distilspeed.trainer.data.batches import corpus_masking_rule
from distilspeed.trainer.data.masking import IGNORE_INDEX
from distilspeed.trainer.data.micro_batch import MicroBatch, masked_micro_batch, row_token_counts
from distilspeed.trainer.errors import NumericalError
from distilspeed.trainer.evaluation.report import MaskedTokenQuality
from distilspeed.trainer.models.packed_forward import forward_packed

ROWS_PER_BATCH = 8
# Added to the seed, so that the key differs from every training run's: seeds of training are below 2^32.
EVALUATION_STREAM = 1 << 62


@dataclass(frozen=True)
class MaskedTokenPredictions:
    """A model's predictions for every masked token, in the order of the rows, on the CPU."""

    losses: torch.Tensor  # float32 [masked tokens], -log softmax(logits)[label]
    predicted: torch.Tensor  # int64 [masked tokens], the token with the highest logit
    labels: torch.Tensor  # int64 [masked tokens]

    def quality(self) -> MaskedTokenQuality:
        """Return the means over all masked tokens, not over batches."""
        loss = self.losses.double().mean().item()
        if not np.isfinite(loss):
            raise NumericalError(f"the model's loss on the held-out rows is {loss}; its weights are damaged")
        accuracy = (self.predicted == self.labels).double().mean().item()
        return MaskedTokenQuality(loss, accuracy, len(self.labels))

    def agreement(self, other: "MaskedTokenPredictions") -> float:
        """Return the share of masked tokens for which both models predict the same token."""
        return (self.predicted == other.predicted).double().mean().item()


def masked_token_quality(
    model: PreTrainedModel, corpus: Corpus, max_rows: int, batch_size: int = ROWS_PER_BATCH, seed: int = 0
) -> MaskedTokenQuality:
    """Measure loss and accuracy of a masked language model on the first ``max_rows`` held-out rows of a corpus.

    Tokens are masked as in training (rare tokens preferred), so the loss is comparable with ``loss_mlm`` of training.
    The masks depend only on the corpus and the seed, so every model sees the same masks. They come from another random
    stream than those of training. The model keeps its device and mode.

    Raises:
        NumericalError: the loss is not finite.
    """
    return predict_masked_tokens(model, corpus, max_rows, batch_size, seed).quality()


@torch.inference_mode()
def predict_masked_tokens(
    model: PreTrainedModel, corpus: Corpus, max_rows: int, batch_size: int, seed: int
) -> MaskedTokenPredictions:
    """Return loss and prediction for every masked token of the first ``max_rows`` held-out rows."""
    was_training = model.training
    model.eval()
    parts = []
    for batch in held_out_batches(corpus, max_rows, batch_size, seed):
        masked = batch.labels != IGNORE_INDEX
        logits = forward_packed(model, batch.to(model.device)).logits[masked.to(model.device)]
        logits = logits[:, : corpus.manifest.vocab_size].float()  # a model may have more rows than tokens
        labels = batch.labels[masked]
        losses = nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none")
        parts.append((losses.cpu(), logits.argmax(dim=-1).cpu(), labels))
    model.train(was_training)
    return MaskedTokenPredictions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def held_out_batches(corpus: Corpus, max_rows: int, batch_size: int, seed: int) -> Iterator[MicroBatch]:
    """Yield the first ``max_rows`` held-out rows, masked; the last batch may be smaller."""
    rule, held_out = corpus_masking_rule(corpus), corpus.held_out
    real_tokens, masked_tokens = row_token_counts(held_out)
    rows = np.arange(min(max_rows, len(held_out)))
    for row_ids in np.split(rows, range(batch_size, len(rows), batch_size)):
        yield masked_micro_batch(
            read_rows(held_out, row_ids),
            row_ids,
            np.zeros_like(row_ids),
            rule,
            EVALUATION_STREAM + seed,
            real_tokens=int(real_tokens[row_ids].sum()),
            masked_tokens=int(masked_tokens[row_ids].sum()),
        )
