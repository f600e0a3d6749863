"""What is measured of a masked language model: quality on held-out rows, size, latency."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, read_rows
from distilspeed.trainer.data.batches import MicroBatch, corpus_masking_rule, document_layout, masked_places
from distilspeed.trainer.data.masking import IGNORE_INDEX, mask_row
from distilspeed.trainer.errors import NumericalError
from distilspeed.trainer.evaluation.report import MaskedTokenQuality
from distilspeed.trainer.models.packed_forward import forward_packed

ROWS_PER_BATCH = 8
# Added to the seed: a key that no training run's masks are drawn with, whose seeds are below 2^32.
EVALUATION_STREAM = 1 << 62


# --- masked tokens of held-out rows ---------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedTokenPredictions:
    """What a model says of each masked token, in the rows' order, on the CPU."""

    losses: torch.Tensor  # float32 [masked tokens], -log softmax(logits)[label]
    predicted: torch.Tensor  # int64 [masked tokens], the token with the highest logit
    labels: torch.Tensor  # int64 [masked tokens]

    def quality(self) -> MaskedTokenQuality:
        """Means over all masked tokens, not means of batches' means."""
        loss = self.losses.double().mean().item()
        if not np.isfinite(loss):
            raise NumericalError(f"the model's loss on the held-out rows is {loss}: its weights are damaged")
        accuracy = (self.predicted == self.labels).double().mean().item()
        return MaskedTokenQuality(loss, accuracy, len(self.labels))

    def agreement(self, other: "MaskedTokenPredictions") -> float:
        """Share of the masked tokens for which both predict the same token."""
        return (self.predicted == other.predicted).double().mean().item()


def masked_token_quality(
    model: PreTrainedModel, corpus: Corpus, max_rows: int, batch_size: int = ROWS_PER_BATCH, seed: int = 0
) -> MaskedTokenQuality:
    """Loss and accuracy of a masked language model on the corpus's first ``max_rows`` held-out rows.

    Tokens are masked as in training (rare ones preferred), so that the loss compares with training's
    ``loss_mlm``. The masks depend on the corpus and the seed alone, so every model sees the same ones, and
    they come from another random stream than training's. The model stays where it is, in the mode it was in.

    Raises:
        NumericalError: the loss is not finite.
    """
    return predict_masked_tokens(model, corpus, max_rows, batch_size, seed).quality()


@torch.inference_mode()
def predict_masked_tokens(
    model: PreTrainedModel, corpus: Corpus, max_rows: int, batch_size: int, seed: int
) -> MaskedTokenPredictions:
    """Loss and prediction for every masked token of the first ``max_rows`` held-out rows."""
    was_training = model.training
    model.eval()
    parts = []
    for batch in held_out_batches(corpus, max_rows, batch_size, seed):
        masked = batch.labels != IGNORE_INDEX
        logits = forward_packed(model, batch.to(model.device)).logits[masked.to(model.device)].float()
        labels = batch.labels[masked]
        losses = nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none")
        parts.append((losses.cpu(), logits.argmax(dim=-1).cpu(), labels))
    model.train(was_training)
    return MaskedTokenPredictions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def held_out_batches(corpus: Corpus, max_rows: int, batch_size: int, seed: int) -> Iterator[MicroBatch]:
    """The first held-out rows, masked; the last batch may be smaller."""
    rule = corpus_masking_rule(corpus)
    rows = np.arange(min(max_rows, len(corpus.held_out)))
    for first in range(0, len(rows), batch_size):
        of_batch = rows[first : first + batch_size]
        stored = read_rows(corpus.held_out, of_batch)
        masked = [
            mask_row(ids, int(lengths.sum()), rule, EVALUATION_STREAM + seed, epoch=0, row=int(row))
            for ids, lengths, row in zip(stored.input_ids, stored.document_lengths, of_batch, strict=True)
        ]
        labels = np.stack([labels for _, labels in masked])
        document_ids, position_ids = document_layout(stored.document_lengths, corpus.manifest.seq_length)
        yield MicroBatch(
            input_ids=torch.from_numpy(np.stack([ids for ids, _ in masked])),
            labels=torch.from_numpy(labels),
            document_ids=torch.from_numpy(document_ids),
            position_ids=torch.from_numpy(position_ids),
            row_ids=torch.from_numpy(of_batch),
            real_tokens=torch.tensor(np.concatenate(stored.document_lengths).sum(), dtype=torch.float32),
            masked_tokens=torch.tensor((labels != IGNORE_INDEX).sum(), dtype=torch.float32),
            masked_places=torch.from_numpy(masked_places(labels)),
        )


# --- size and latency -----------------------------------------------------------------------------------
