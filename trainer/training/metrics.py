"""Metrics of a run: collected on the device, read once per logging interval, written as JSON lines."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import deepspeed
import torch
import torch.distributed
from tqdm import tqdm

from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.engine.checkpoint import Progress
from distilspeed.trainer.engine.student import loss_scale
from distilspeed.trainer.errors import NumericalError
from distilspeed.trainer.files import write_text, writing
from distilspeed.trainer.training.step import StepResult

ROW_IDS_SHOWN = 64


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``: an optimiser step of the whole job.

    ``loss`` is the weighted sum of the terms; ``losses`` has the value of each term by name, ``loss_NAME`` in the file.
    All are means over the global batch. ``tokens`` counts real (non-padding) tokens so far. ``tokens_per_s`` and
    ``mfu`` are averages over the logging interval. ``time`` is in seconds since the epoch. ``skipped`` counts batches
    that were skipped after an fp16 overflow; skipped batches are not steps and are not logged.
    """

    step: int
    epoch: float
    tokens: int
    loss: float
    losses: Mapping[str, float]
    lr: float
    grad_norm: float | None
    loss_scale: float
    skipped: int
    tokens_per_s: float
    mfu: float
    time: float

    def to_json(self) -> dict[str, Any]:
        """Return the line as a flat object."""
        line: dict[str, Any] = {}
        for name, value in vars(self).items():
            line |= {f"loss_{term}": of for term, of in value.items()} if name == "losses" else {name: value}
        return line

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        names = {field.name for field in fields(cls)}
        losses = {name.removeprefix("loss_"): of for name, of in line.items() if name not in names}
        return cls(losses=losses, **{name: value for name, value in line.items() if name in names})


@dataclass(frozen=True)
class _PendingStep:
    progress: Progress  # with this step
    epoch: float
    result: StepResult
    lr: float
    loss_scale: float
    skipped: int


class Metrics:
    """Collects the measurements of each step; rank 0 writes them every ``logging_steps`` steps.

    Args:
        path: ``metrics.jsonl``; lines after ``first.step`` are removed (a resumed run writes them again).
        batches: maps a fault to its rows.
        progress_bar: rank 0's progress bar; disabled on other ranks.
        terms: the names of the losses, in the order of a step's parts.
        flops_per_token: FLOPs of the whole step, per real token.
        peak_flops: FLOP/s of all ranks together, for MFU.
        first: the progress at which the run starts or resumes.
    """

    def __init__(
        self,
        path: Path,
        engine: deepspeed.DeepSpeedEngine,
        batches: MicroBatches,
        progress_bar: "tqdm[int]",
        logging_steps: int,
        terms: Sequence[str],
        flops_per_token: float,
        peak_flops: float,
        first: Progress,
    ) -> None:
        self.path = path
        self.engine = engine
        # The engine's own events are a part of ours, but count samples: W&B ignores steps that go back.
        self.writes_events = engine.monitor.enabled
        engine.monitor.enabled = False
        self.batches = batches
        self.progress_bar = progress_bar
        self.logging_steps = logging_steps
        self.terms = terms
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.is_writer = torch.distributed.get_rank() == 0
        self.pending: list[_PendingStep] = []
        self.since, self.tokens_before = time.perf_counter(), first.tokens
        if self.is_writer:
            with writing(path):
                _keep_lines_up_to(path, first.step)

    def end_step(self, progress: Progress, epoch: float, result: StepResult, lr: float) -> None:
        """Record a step, whether or not it updated the parameters.

        Args:
            progress: the progress after this step.
            lr: the learning rate of this step.

        Raises:
            NumericalError: see :meth:`flush`.
        """
        scale, skipped = loss_scale(self.engine), self.engine.skipped_steps
        self.pending.append(_PendingStep(progress, epoch, result, lr, scale, skipped))
        self.progress_bar.update(result.is_update)
        if progress.batches % self.logging_steps == 0:
            self.flush()

    def flush(self) -> None:
        """Read the pending steps from the device, check and write them; called by every rank.

        Raises:
            NumericalError: a loss or gradient is not finite, and fp16 overflow is not the cause.
        """
        if not self.pending:
            return
        losses = torch.stack([step.result.parts.sum(0) for step in self.pending])
        torch.distributed.all_reduce(losses)
        now, tokens = time.perf_counter(), self.pending[-1].progress.tokens
        tokens_per_s = (tokens - self.tokens_before) / (now - self.since)
        mfu = tokens_per_s * self.flops_per_token / self.peak_flops
        lines = []
        for step, parts in zip(self.pending, losses.tolist(), strict=True):
            grad_norm = None if step.result.grad_norm is None else float(step.result.grad_norm)
            self._check_finite(step, parts, grad_norm)
            line = StepMetrics(
                step=step.progress.step,
                epoch=round(step.epoch, 4),
                tokens=step.progress.tokens,
                loss=parts[0],
                losses=dict(zip(self.terms, parts[1:], strict=True)),
                lr=step.lr,
                grad_norm=grad_norm,
                loss_scale=step.loss_scale,
                skipped=step.skipped,
                tokens_per_s=round(tokens_per_s, 1),
                mfu=round(mfu, 4),
                time=round(time.time(), 3),
            )
            lines += [line] * step.result.is_update
        self.pending.clear()
        self.since, self.tokens_before = now, tokens
        if self.is_writer and lines:
            with writing(self.path):
                self._write(lines)

    def _check_finite(self, step: _PendingStep, loss: Sequence[float], grad_norm: float | None) -> None:
        is_fp16_overflow = not step.result.is_update and self.engine.fp16_enabled()
        if not all(map(math.isfinite, loss)):
            what = f"loss is {loss[0]}"
        elif is_fp16_overflow or (step.result.is_update and math.isfinite(grad_norm or 0.0)):
            return
        else:
            what = f"gradient is {grad_norm}"
        number = step.progress.step + (not step.result.is_update)
        raise NumericalError(
            f"at step {number} the {what}, {self._origin(step)}; earlier checkpoints are kept: "
            "inspect these rows, or continue with --resume and a lower learning rate"
        )

    def _origin(self, step: _PendingStep) -> str:
        """Describe the rows whose values are not finite; called by every rank."""
        result, index = step.result, step.progress.batches - 1
        is_finite = result.parts.isfinite().all(dim=1) & result.gradients_are_finite
        found = [self.batches.rows_of(index, int(number)) for number in (~is_finite).nonzero()]
        of_ranks: list[list[list[int]]] = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, found)
        for rank, of_rank in enumerate(of_ranks):
            if of_rank:
                return f"from row ids {_listed(of_rank[0])} on rank {rank}"
        _, rows = self.batches.global_batch(index)
        return f"from row ids {_listed(rows.tolist())}, the global batch"

    def _write(self, lines: Sequence[StepMetrics]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line.to_json()) + "\n" for line in lines)
        last = lines[-1]
        shown = {"loss": f"{last.loss:.4f}", "tokens_per_s": f"{last.tokens_per_s:,.0f}"}
        if last.skipped:
            shown["skipped"] = str(last.skipped)
        self.progress_bar.set_postfix(shown, refresh=False)
        if self.writes_events:
            self.engine.monitor.write_events(
                [
                    (f"Train/{name}", value, line.step)
                    for line in lines
                    for name, value in line.to_json().items()
                    if name not in ("step", "time") and value is not None
                ]
            )


def _listed(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - ROW_IDS_SHOWN} more" if len(rows) > ROW_IDS_SHOWN else ""
    return ", ".join(map(str, rows[:ROW_IDS_SHOWN])) + more


def _keep_lines_up_to(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # a half-written line of a killed run
        return math.inf


def read_metrics(path: Path) -> list[StepMetrics]:
    """Read ``metrics.jsonl``."""
    return [StepMetrics.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
