"""Metrics of a run: gathered on the device, read once per logging interval, written as JSON lines."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed
from tqdm import tqdm

from distilspeed.trainer.distillation import LossParts
from distilspeed.trainer.engines import loss_scale
from distilspeed.trainer.errors import NumericalError
from distilspeed.trainer.files import write_text


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``: an optimiser step of the whole job.

    Losses are means over the global batch. ``tokens`` are real (non-padding) tokens seen so far,
    ``tokens_per_s`` and ``mfu`` averages over the logging interval, ``time`` seconds since the epoch.
    """

    step: int
    epoch: float
    tokens: int
    loss: float
    loss_ce: float
    loss_mlm: float
    loss_cos: float
    lr: float
    grad_norm: float | None
    loss_scale: float
    skipped: int
    tokens_per_s: float
    mfu: float
    time: float


@dataclass(frozen=True)
class _PendingStep:
    step: int
    epoch: float
    tokens: int
    parts: torch.Tensor  # float32 [4], this rank's share of the global means
    grad_norm: float | torch.Tensor | None
    lr: float
    loss_scale: float
    skipped: int


class Metrics:
    """Collects what each step measured and writes it every ``logging_steps`` steps, rank 0 only.

    Args:
        path: ``metrics.jsonl``; lines after ``first_step`` are dropped (a resumed run makes them again).
        progress_bar: rank 0's, or a disabled one.
        flops_per_token: of the whole step, per real token.
        peak_flops: FLOP/s of all ranks together, for MFU.
    """

    def __init__(
        self,
        path: Path,
        engine: deepspeed.DeepSpeedEngine,
        progress_bar: "tqdm[int]",
        logging_steps: int,
        flops_per_token: float,
        peak_flops: float,
        first_step: int,
        first_tokens: int,
    ) -> None:
        self.path = path
        self.engine = engine
        self.progress_bar = progress_bar
        self.logging_steps = logging_steps
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.is_writer = torch.distributed.get_rank() == 0
        self.pending: list[_PendingStep] = []
        self.since, self.tokens_before = time.perf_counter(), first_tokens
        if self.is_writer:
            _keep_lines_up_to(path, first_step)

    def end_step(
        self,
        step: int,
        epoch: float,
        tokens: int,
        parts: torch.Tensor,
        grad_norm: float | torch.Tensor | None,
        lr: float,
    ) -> None:
        """Close optimiser step ``step`` (counted from 1).

        Args:
            parts: float32 [4] on the device, this rank's share of the loss parts.
        """
        self.pending.append(
            _PendingStep(
                step=step,
                epoch=epoch,
                tokens=tokens,
                parts=parts,
                grad_norm=grad_norm,
                lr=lr,
                loss_scale=loss_scale(self.engine),
                skipped=self.engine.skipped_steps,
            )
        )
        self.progress_bar.update()
        if step % self.logging_steps == 0:
            self.flush()

    def flush(self) -> None:
        """Read the pending steps from the device, check and write them; every rank calls this.

        Raises:
            NumericalError: a step's loss is not finite.
        """
        if not self.pending:
            return
        losses = torch.stack([pending.parts for pending in self.pending])
        torch.distributed.all_reduce(losses)
        now, tokens = time.perf_counter(), self.pending[-1].tokens
        tokens_per_s = (tokens - self.tokens_before) / (now - self.since)
        mfu = tokens_per_s * self.flops_per_token / self.peak_flops
        lines = [
            StepMetrics(
                step=pending.step,
                epoch=round(pending.epoch, 4),
                tokens=pending.tokens,
                **dict(zip(LossParts._fields, parts, strict=True)),
                lr=pending.lr,
                grad_norm=None if pending.grad_norm is None else float(pending.grad_norm),
                loss_scale=pending.loss_scale,
                skipped=pending.skipped,
                tokens_per_s=round(tokens_per_s, 1),
                mfu=round(mfu, 4),
                time=round(time.time(), 3),
            )
            for pending, parts in zip(self.pending, losses.tolist(), strict=True)
        ]
        self.pending.clear()
        self.since, self.tokens_before = now, tokens
        for line in lines:
            if not math.isfinite(line.loss):
                raise NumericalError(
                    f"the loss of step {line.step} is {line.loss}; the last checkpoint is kept, --resume continues it"
                )
        if self.is_writer:
            self._write(lines)

    def _write(self, lines: Sequence[StepMetrics]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(line)) + "\n" for line in lines)
        last = lines[-1]
        self.progress_bar.set_postfix(
            loss=f"{last.loss:.4f}", tokens_per_s=f"{last.tokens_per_s:,.0f}", refresh=False
        )
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events(
                [
                    (f"Train/{name}", value, line.step)
                    for line in lines
                    for name, value in asdict(line).items()
                    if name not in ("step", "time") and value is not None
                ]
            )


def _keep_lines_up_to(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the line a killed run was writing
        return math.inf


def read_metrics(path: Path) -> list[StepMetrics]:
    """Read ``metrics.jsonl``."""
    return [StepMetrics(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_losses(metrics: Sequence[StepMetrics], path: Path) -> None:
    """Draw the weighted loss and its parts over the steps; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [line.step for line in metrics]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    curves = {"loss": "weighted sum", "loss_ce": "soft targets", "loss_mlm": "MLM", "loss_cos": "cosine"}
    for name, label in curves.items():
        values = [getattr(line, name) for line in metrics]
        if any(values):
            axes.plot(steps, values, label=label, linewidth=1.2)
    axes.set(xlabel="optimiser step", ylabel="loss, mean over the global batch", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    beside = path.with_name(f".{path.name}.incomplete")
    figure.savefig(beside, dpi=120, format="png")
    beside.replace(path)
    pyplot.close(figure)
