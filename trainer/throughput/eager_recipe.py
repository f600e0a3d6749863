"""The baseline: DistilBERT's original training recipe in eager PyTorch (Sanh et al. 2019), without DeepSpeed.

It follows the training code published with the paper. Each piece of text is its own row. Rows of similar length form a
batch and are padded to the longest. Masks are drawn over the whole batch. The losses select real tokens from the
logits with ``masked_select`` and use PyTorch's ``log_softmax``, ``softmax``, ``KLDivLoss``, ``CrossEntropyLoss`` and
``CosineEmbeddingLoss``. Every micro-batch reads its losses with ``.item()``. The models are plain transformers models.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, read_rows
from distilspeed.trainer.data.batches import corpus_masking_rule
from distilspeed.trainer.data.masking import (
    IGNORE_INDEX,
    KEEP_SHARE,
    MASK_SHARE,
    MASKED_FRACTION,
    MaskingRule,
)
from distilspeed.trainer.engine.config_auto import ADAM_BETAS, ADAM_EPS, GRADIENT_CLIPPING, LEARNING_RATE
from distilspeed.trainer.objective.hidden_cosine import HiddenCosine
from distilspeed.trainer.objective.masked_lm import MaskedLM
from distilspeed.trainer.objective.soft_targets import SoftTargets

# Lengths within this many tokens of each other share batches.
LENGTH_BUCKET = 4
ROWS_READ_AT_A_TIME = 1024


class PaddedBatch(NamedTuple):
    """Pieces padded to the longest, before masking."""

    input_ids: Tensor  # int64 [rows, longest]
    attention_mask: Tensor  # bool [rows, longest]


@dataclass(frozen=True)
class BucketedPieces:
    """The pieces of a corpus's first rows in random order; each batch has pieces of one length bucket.

    A batch holds about ``tokens_per_batch`` tokens, and at least one piece.
    """

    corpus: Corpus
    rows: int
    tokens_per_batch: int
    seed: int

    def batches(self) -> Iterator[PaddedBatch]:
        """Yield batches forever, every piece once per epoch; the last batch of each bucket may be smaller."""
        pieces = self._pieces()
        generator = np.random.default_rng(self.seed)
        while True:
            order = generator.permutation(len(pieces))
            buckets: dict[int, list[int]] = {}
            for index in order:
                buckets.setdefault(len(pieces[index]) // LENGTH_BUCKET, []).append(index)
            groups = [
                bucket[first : first + size]
                for bucket in buckets.values()
                for size in [max(1, round(self.tokens_per_batch / len(pieces[bucket[0]])))]
                for first in range(0, len(bucket), size)
            ]
            for group in generator.permutation(len(groups)):
                yield self._padded([pieces[index] for index in groups[group]])

    def _pieces(self) -> list[NDArray[np.int64]]:
        pieces: list[NDArray[np.int64]] = []
        for first in range(0, self.rows, ROWS_READ_AT_A_TIME):
            stored = read_rows(self.corpus.train, range(first, min(first + ROWS_READ_AT_A_TIME, self.rows)))
            for row, lengths in zip(stored.input_ids, stored.document_lengths, strict=True):
                pieces += np.split(row[: lengths.sum()], np.cumsum(lengths)[:-1])
        return pieces

    def _padded(self, pieces: list[NDArray[np.int64]]) -> PaddedBatch:
        longest = max(map(len, pieces))
        padding = self.corpus.manifest.pad_id
        input_ids = [piece.tolist() + [padding] * (longest - len(piece)) for piece in pieces]
        lengths = torch.tensor([len(piece) for piece in pieces])
        return PaddedBatch(torch.tensor(input_ids), torch.arange(longest) < lengths[:, None])


class EagerRecipe:
    """Teacher, student and optimiser of the baseline on one device, with weights and moments in float32.

    Half precision uses torch.autocast and, for float16, a GradScaler. They replace the apex of the original code.

    Args:
        student, teacher: float32 on ``device``; the student in training mode, the teacher in evaluation mode.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        pieces: BucketedPieces,
        accumulation_steps: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.accumulation_steps = accumulation_steps
        self.device = device
        self.batches = pieces.batches()
        rule = corpus_masking_rule(pieces.corpus)
        assert rule is not None  # launch/benchmark.py refuses causal corpora
        self.rule = rule
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.weights = torch.from_numpy(self.rule.sampling_weights).float().to(device)
        self.optimizer = torch.optim.AdamW(
            student.parameters(), lr=LEARNING_RATE, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.0
        )

    def step(self) -> tuple[int, float]:
        """Take one optimiser step; return its number of real tokens and the last micro-batch's loss."""
        tokens = 0
        for _ in range(self.accumulation_steps):
            batch = PaddedBatch(*(tensor.to(self.device) for tensor in next(self.batches)))
            tokens += int(batch.attention_mask.sum().item())
            input_ids, labels = mask_batch(batch, self.weights, self.rule)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.loss(input_ids, batch.attention_mask, labels)
            if loss.isnan().any():
                raise FloatingPointError("the eager recipe's loss is not a number")
            self.scaler.scale(loss / self.accumulation_steps).backward()
            last = loss.item()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters(), GRADIENT_CLIPPING)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return tokens, last

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted sum of the losses; every mean is over this micro-batch only."""
        soft, mlm, cosine = SoftTargets(), MaskedLM(), HiddenCosine()  # with the published weights
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "output_hidden_states": True}
        student = self.student(**arguments)
        with torch.no_grad():
            teacher = self.teacher(**arguments)
        vocab_size = student.logits.shape[-1]
        over_logits = attention_mask[:, :, None].expand_as(student.logits)
        student_logits = student.logits.masked_select(over_logits).view(-1, vocab_size)
        teacher_logits = teacher.logits.masked_select(over_logits).view(-1, vocab_size)
        loss_ce = soft.temperature**2 * nn.functional.kl_div(
            nn.functional.log_softmax(student_logits / soft.temperature, dim=-1),
            nn.functional.softmax(teacher_logits / soft.temperature, dim=-1),
            reduction="batchmean",
        )
        loss_mlm = nn.functional.cross_entropy(student.logits.view(-1, vocab_size), labels.view(-1))
        student_states, teacher_states = student.hidden_states[-1], teacher.hidden_states[-1]
        over_states = attention_mask[:, :, None].expand_as(student_states)
        size = student_states.shape[-1]
        student_states = student_states.masked_select(over_states).view(-1, size)
        teacher_states = teacher_states.masked_select(over_states).view(-1, size)
        loss_cos = nn.functional.cosine_embedding_loss(
            student_states.float(),
            teacher_states.float(),
            torch.ones(len(student_states), device=self.device),
        )
        parts = ((soft.weight, loss_ce), (mlm.weight, loss_mlm), (cosine.weight, loss_cos))
        for _, part in parts:
            part.item()  # the recipe logs each loss of each micro-batch
        return torch.stack([weight * part for weight, part in parts]).sum()


def mask_batch(batch: PaddedBatch, weights: Tensor, rule: MaskingRule) -> tuple[Tensor, Tensor]:
    """Draw 15 % of a batch's tokens by weight: 80 % become [MASK], 10 % stay, 10 % become a random token.

    Args:
        weights: float32 [vocabulary], zero for special tokens.

    Returns:
        masked ids and labels (-100 for tokens that were not drawn), int64 [rows, longest].
    """
    drawable = weights[batch.input_ids] * batch.attention_mask
    count = math.ceil(MASKED_FRACTION * int(batch.attention_mask.sum().item()))
    count = min(count, int((drawable > 0).sum().item()))
    drawn = torch.multinomial(drawable.flatten() / drawable.sum(), count, replacement=False)
    chosen = torch.zeros_like(batch.attention_mask).flatten()
    chosen[drawn] = True
    chosen = chosen.view_as(batch.attention_mask)

    real = batch.input_ids[chosen]
    shares = torch.tensor([MASK_SHARE, KEEP_SHARE, 1 - MASK_SHARE - KEEP_SHARE], device=real.device)
    action = torch.multinomial(shares, len(real), replacement=True)
    random = torch.randint_like(real, rule.vocab_size)
    replacement = torch.full_like(real, rule.mask_token_id) * (action == 0)
    replacement += real * (action == 1) + random * (action == 2)
    labels = batch.input_ids.masked_fill(~chosen, IGNORE_INDEX)
    return batch.input_ids.masked_scatter(chosen, replacement), labels
