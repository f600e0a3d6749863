"""The results of a benchmark: table, JSON, and the check against an earlier benchmark."""

import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from distilspeed.kernels.profiling.machine import Machine
from distilspeed.trainer.engine.phases import COMMUNICATION
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.throughput.contestants import EAGER, OURS
from distilspeed.trainer.throughput.measurement import Comparison
from distilspeed.trainer.throughput.v100 import is_limited_to_v100
from distilspeed.trainer.training.run import Run

MIB = 2**20
# The check fails if the ratio is lower than a stored one by more than this.
TOLERATED_LOSS = 0.10
# The paper's run: 8 V100s for 90 hours, three epochs of Wikipedia and BookCorpus (Sanh et al. 2019).
PAPER_TOKENS = 13e9


@dataclass(frozen=True)
class BenchmarkReport:
    """A benchmark, as it is stored.

    setting            models, rows, batch, precision, ZeRO stage
    machine            machine, versions, date, command
    ratio              our real tokens per second over the eager recipe's, median over the rounds
    ratios             the ratio of each round, in which both ran directly after each other
    tokens_per_s       median over the rounds
    flops_per_token    FLOPs of the method: student forward and backward, teacher forward
    mfu                FLOP/s of the method over the FLOP/s of the fastest large matrix product measured in the run
    resident, peak     bytes of tensors between steps, and the most during a step
    phases             share of our step's time in each phase
    scaling            ranks -> tokens per second relative to one rank, both under the launcher
    """

    setting: dict[str, Any]
    machine: dict[str, Any]
    ratio: float
    ratios: list[float]
    tokens_per_s: dict[str, float]
    flops_per_token: float
    mfu: dict[str, float]
    resident: dict[str, int]
    peak: dict[str, int]
    phases: dict[str, float]
    scaling: dict[str, float]

    @classmethod
    def of(cls, run: Run, comparison: Comparison, scaling: dict[str, float]) -> "BenchmarkReport":
        """Make the report from the measurements; ``run`` is prepared, not trained."""
        student, teacher = run.shapes()
        assert teacher is not None
        flops = run.flops_per_token()
        rates = {name: [lap.tokens_per_s for lap in laps] for name, laps in comparison.laps.items()}
        ratios = np.divide(rates[OURS], rates[EAGER]).tolist()
        medians = {name: float(np.median(of_laps)) for name, of_laps in rates.items()}
        footprints = comparison.footprints
        peak_flops = max(footprint.matmul_flops for footprint in footprints.values())
        in_phases = {
            name: seconds for name, seconds in footprints[OURS].phases.items() if name != COMMUNICATION
        }
        in_all = sum(in_phases.values())
        return cls(
            setting={
                "layers": f"{teacher.layers} -> {student.layers}",
                "hidden_size": student.hidden_size,
                "vocab_size": student.vocab_size,
                "seq_length": run.corpus.manifest.seq_length,
                "micro_batch_size": run.batch.micro_batch_size,
                "accumulation_steps": run.batch.gradient_accumulation_steps,
                "precision": run.precision,
                "zero_stage": run.deepspeed_config.zero_stage,
                "compile": footprints[OURS].compile,
                "restrict_ce_to_mask": run.objective.settings()["restrict_ce_to_mask"],
                "padding_of_corpus": round(run.corpus.manifest.padding_fraction, 4),
            }
            | ({"limited_to": "V100"} if is_limited_to_v100() else {}),
            machine=asdict(Machine.here(run.process.device))
            | {f"{package}_version": version(package) for package in ("deepspeed", "transformers")},
            ratio=float(np.median(ratios)),
            ratios=ratios,
            tokens_per_s=medians,
            flops_per_token=flops,
            mfu={name: medians[name] * flops / peak_flops for name in medians},
            resident={name: footprint.resident for name, footprint in footprints.items()},
            peak={name: footprint.peak for name, footprint in footprints.items()},
            phases={name: seconds / in_all for name, seconds in footprints[OURS].phases.items()},
            scaling=scaling,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> str:
        lines = [
            f"{self.machine['device']}; {self.machine['date']}",
            ", ".join(f"{name} {value}" for name, value in self.setting.items()),
            "",
            f"{'':14}{'real tokens/s':>15}{'of eager':>10}{'MFU':>8}{'tensors, peak':>15}",
        ]
        for name in (OURS, EAGER):
            relative = self.ratio if name == OURS else 1.0
            lines.append(
                f"{name:14}{self.tokens_per_s[name]:15,.0f}{relative:9.2f}x{self.mfu[name]:8.1%}"
                f"{self.peak[name] / MIB:11,.0f} MiB"
            )
        lines += [f"ratio of each round: {', '.join(f'{ratio:.2f}' for ratio in self.ratios)}", ""]
        lines += [f"{name:42}{share:7.1%}" for name, share in self.phases.items()]
        lines += [f"{ranks} ranks: {ratio:.2f}x one rank" for ranks, ratio in self.scaling.items()]
        hours = PAPER_TOKENS / self.tokens_per_s[OURS] / 3600
        lines.append(f"the paper's run (13 G tokens) at this rate: {hours:,.0f} hours")
        return "\n".join(lines)


def read_stored(path: Path) -> tuple[float, dict[str, Any]]:
    """Read ratio and setting of a stored report.

    Raises:
        UserError: the file cannot be read, or is not a stored report.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        ratio, setting = float(stored["ratio"]), dict(stored["setting"])
        if not 0 < ratio < math.inf:
            raise ValueError(f"its ratio is {ratio}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            "unreadable-file", f"{path} is not a stored benchmark ({error}); give a file written by --output"
        ) from error
    return ratio, setting


def check_against(stored: Path, report: BenchmarkReport) -> None:
    """Raise a UserError if the ratio is more than 10 % below a stored report's with the same setting."""
    ratio, setting = read_stored(stored)
    names = {**setting, **report.setting}
    different = [name for name in names if setting.get(name) != report.setting.get(name)]
    if different:
        raise UserError(
            "changed-benchmark",
            f"{stored} was measured with a different {', '.join(different)}; compare with the same setting",
        )
    if report.ratio < (1 - TOLERATED_LOSS) * ratio:
        raise UserError(
            "slower-than-before",
            f"the trainer is {report.ratio:.2f} times as fast as the eager recipe, and was {ratio:.2f} times as fast "
            f"in {stored}; find out what made it slower",
        )
