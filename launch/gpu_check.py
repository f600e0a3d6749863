"""Prove kernels and trainer on this machine's GPU, unattended, in ten minutes.

    bash launch/gpu_check.sh --output_dir DIR [--teacher DIR --text FILE... [--task DIR]]

Runs the tests that need a GPU, some under compute-sanitizer too; profiles the kernels; measures the training of a
model of BERT-base's shape against the eager recipe, also under a V100's limits; and distils for real, a teacher of
yours or a small one that is trained first. A part that fails stops no other. Prints report.md, and writes it with
report.json and the parts' own files. Status 1 if a part failed.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from distilspeed.trainer.errors import CommandParser, UserError, quiet_libraries, run_command
from distilspeed.trainer.files import check_unoccupied, write_text, writing

if TYPE_CHECKING:
    from distilspeed.kernels.profiling.machine import Machine

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"
TESTS, KERNELS, TRAINING, DISTILLATION = GROUPS = "tests", "kernels", "training", "distillation"
SECONDS_TO_END = 10.0
SECONDS_OF_TESTS, SECONDS_OF_MEASUREMENT = 240.0, 150.0
# So many test processes share the GPU: most of their time is compiling.
TEST_PROCESSES = 4
# Every pass of every loss, at the launches of production.
MEMCHECK_TESTS = "production or same_bits or not_a_bit or in_place"


@dataclass(frozen=True)
class Sizes:
    """How much is done; the defaults are for a modern GPU.

    rows, dtypes, vocab_size, hidden_size, peers, repeats    of the kernels' profiles
    precision        of all training
    micro_batches    length of the rows of the measured training -> rows in a micro-batch
    accumulation     micro-batches of a step of it
    measured         config of its teacher; {}: BERT-base
    v100_batch       rows of a step of the V100 recipe
    steps, batch     of the distillation, and the baseline without a teacher
    """

    rows: tuple[int, ...] = (4096, 16384)
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    vocab_size: int = 30522
    hidden_size: int = 768
    peers: str = "eager,compile,liger"
    repeats: int = 20
    precision: str = "fp16"
    zero_stages: tuple[int, ...] = (1, 2)
    micro_batches: Mapping[int, int] = field(default_factory=lambda: {128: 128, 512: 32})
    accumulation: int = 4
    measured: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 3
    v100_batch: int = 128
    teacher_steps: int = 2000
    steps: int = 600
    batch: int = 256
    task_epochs: int = 2


# Everything in small, on any machine.
SMOKE = Sizes(
    rows=(64,),
    dtypes=("fp32",),
    vocab_size=1000,
    hidden_size=64,
    peers="eager",
    repeats=1,
    precision="fp32",
    zero_stages=(2,),
    micro_batches={64: 4},
    accumulation=2,
    measured={
        "vocab_size": 2048,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    rounds=1,
    v100_batch=16,
    teacher_steps=4,
    steps=4,
    batch=32,
    task_epochs=1,
)


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other until one fails.

    group      of GROUPS; None: what the others need
    seconds    it may take
    result     JSON file that the last command writes; what that command prints goes into the report
    """

    name: str
    group: str | None
    seconds: float
    commands: Sequence[Sequence[object]]
    result: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a part; ``said`` is its last line."""

    name: str
    outcome: str
    seconds: float
    commands: list[str]
    said: str
    result: Any = None


class Plan:
    """All parts, by when they run."""

    def __init__(
        self, out: Path, teacher: str | None, text: Sequence[Path] | None, task: Path | None, sizes: Sizes
    ) -> None:
        self.out, self.task, self.sizes = out, task, sizes
        self.makes_teacher = teacher is None
        self.data = out / "data"
        self.text = text or [self.data / "text.txt"]
        self.tokenizer = teacher or self.data / "tokenizer"
        self.teacher = teacher or out / "teacher" / "student"
        self.measured_teacher = out / "measured_teacher"

    def write_inputs(self) -> None:
        """The DeepSpeed configs, and the teacher of the measured training."""
        from transformers import BertConfig, BertForMaskedLM

        for stage in {1, *self.sizes.zero_stages}:
            config = json.loads((ROOT / "ds_configs" / "v100x8_fp16.json").read_text(encoding="utf-8"))
            config |= {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
            config["fp16"]["enabled"] = self.sizes.precision == "fp16"
            config["zero_optimization"]["stage"] = stage
            write_text(self.config(stage), json.dumps(config, indent=2) + "\n")
        BertForMaskedLM(BertConfig(**self.sizes.measured)).save_pretrained(self.measured_teacher)

    def preparation(self) -> Part:
        make_data = [script("quickstart_data.py", "--output_dir", self.data)] if self.makes_teacher else []
        corpora = [self._corpus_of(length) for length in self.sizes.micro_batches]
        return Part("preparation", None, SECONDS_OF_TESTS, [*make_data, *corpora])

    def untimed(self) -> list[Part]:
        """What may run at the same time."""
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
        processes = ["-n", TEST_PROCESSES] if find_spec("xdist") else []
        memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", 1]
        memcheck += [*pytest, "-k", MEMCHECK_TESTS]
        # An allocation of its own for every tensor, so that reading beyond one is found.
        no_pool = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        folders = (os.path.relpath(ROOT / "tests" / name) for name in ("kernels", "trainer", "launch"))
        kernels, *trainer = folders
        return [
            Part("tests of the kernels", TESTS, SECONDS_OF_TESTS, [[*pytest, *processes, kernels]]),
            Part("tests of the trainer", TESTS, SECONDS_OF_TESTS, [[*pytest, *trainer]]),
            Part("memcheck of the kernels", TESTS, SECONDS_OF_TESTS, [[*memcheck, kernels]], None, no_pool),
            self._distillation(),
        ]

    def timed(self) -> list[Part]:
        """Measurements: one after the other, with nothing beside them."""
        sizes = self.sizes
        parts = []
        for length, micro_batch in sizes.micro_batches.items():
            for stage in sizes.zero_stages:
                name, batch = f"training, rows of {length}, ZeRO-{stage}", sizes.accumulation * micro_batch
                parts.append(self._benchmark(name, "benchmark.py", length, stage, micro_batch, batch))
        parts += [self._profile(rows, dtype) for dtype in sizes.dtypes for rows in sizes.rows]
        longest = max(sizes.micro_batches)
        parts.append(self._benchmark("V100 recipe", "as_v100.py", longest, 1, 8, sizes.v100_batch))
        return [*parts, self._evaluation()]

    def config(self, stage: int) -> Path:
        return self.out / f"zero{stage}.json"

    def corpus(self, length: int) -> Path:
        return self.out / f"corpus_{length}"

    def _corpus_of(self, length: int) -> list[object]:
        what = ["--text", *self.text, "--tokenizer", self.tokenizer, "--seq_length", length]
        what += ["--held_out_fraction", 0.05, "--output_dir", self.corpus(length)]
        return script("prepare_data.py", *what)

    def _distillation(self) -> Part:
        from distilspeed.trainer.engines import free_port

        sizes, shortest, port = self.sizes, min(self.sizes.micro_batches), free_port()

        def train(name: str, steps: int, *teacher: object) -> list[object]:
            launcher = [Path(sys.executable).with_name("deepspeed"), "--log_level", "error"]
            launcher += ["--num_gpus", 1, "--master_port", port]
            what = ["--deepspeed_config", self.config(1), "--data_dir", self.corpus(shortest), *teacher]
            what += ["--train_batch_size", sizes.batch, "--per_device_train_batch_size", sizes.batch // 2]
            what += ["--max_steps", steps, "--output_dir", self.out / name]
            return [*launcher, script("train.py")[1], *what]

        without = ["--teacher", "none", "--student_config"]
        teacher = train("teacher", sizes.teacher_steps, *without, self.data / "teacher_config.json")
        student = train("distilled", sizes.steps, "--teacher", self.teacher)
        baseline = train("baseline", sizes.steps, *without, self.out / "distilled" / "student")
        commands = [*([teacher] if self.makes_teacher else []), student, baseline]
        return Part("distillation", DISTILLATION, SECONDS_OF_TESTS, commands)

    def _evaluation(self) -> Part:
        folder, corpus = self.out / "evaluation", self.corpus(min(self.sizes.micro_batches))
        what = ["--teacher", self.teacher, "--student", self.out / "distilled" / "student"]
        what += ["--baseline", self.out / "baseline" / "student", "--data_dir", corpus]
        if self.task:
            what += ["--task", self.task, "--task_epochs", self.sizes.task_epochs]
        evaluate = script("evaluate.py", *what, "--output_dir", folder)
        return Part("evaluation", DISTILLATION, SECONDS_OF_MEASUREMENT, [evaluate], folder / "report.json")

    def _benchmark(
        self, name: str, which: str, length: int, stage: int, micro_batch: int, batch: int
    ) -> Part:
        what = ["--deepspeed_config", self.config(stage), "--teacher", self.measured_teacher]
        what += ["--data_dir", self.corpus(length), "--train_batch_size", batch]
        what += ["--per_device_train_batch_size", micro_batch, "--rounds", self.sizes.rounds]
        what += ["--dataloader_num_workers", min(4, (os.cpu_count() or 1) - 1)]
        result = self.out / f"{file_name(name)}.json"
        benchmark = script(which, *what, "--output", result)
        return Part(name, TRAINING, SECONDS_OF_MEASUREMENT, [benchmark], result)

    def _profile(self, rows: int, dtype: str) -> Part:
        sizes, folder = self.sizes, self.out / f"kernels_{rows}_{dtype}"
        what = ["--tokens", rows, "--vocab_size", sizes.vocab_size, "--hidden_size", sizes.hidden_size]
        what += ["--dtype", dtype, "--peers", sizes.peers, "--repeats", sizes.repeats, "--output_dir", folder]
        profile = script("profile_kernels.py", *what)
        name = f"kernels, {rows} rows, {dtype}"
        return Part(name, KERNELS, SECONDS_OF_MEASUREMENT, [profile], folder / "profile.json")


def script(name: str, *arguments: object) -> list[object]:
    return [sys.executable, os.path.relpath(ROOT / "launch" / name), *arguments]


class Runner:
    """Runs parts while there is time, and keeps report.json and report.md up to date."""

    def __init__(self, out: Path, machine: "Machine", seconds: float) -> None:
        self.machine = machine
        self.out, self.logs = out, out / "logs"
        self.end = time.monotonic() + seconds
        self.outcomes: list[Outcome] = []
        self._reporting = Lock()

    def run(self, part: Part) -> None:
        start = time.monotonic()
        outcome = self._run_commands(part, min(self.end, start + part.seconds))
        result = json.loads(part.result.read_text("utf-8")) if part.result and outcome == PASSED else None
        programs = f"{Path(sys.executable).parent}/"
        commands = [shlex.join(map(str, each)).replace(programs, "") for each in part.commands]
        with self._reporting:
            seconds = round(time.monotonic() - start, 1)
            said = self._last_line(part, outcome)
            self.outcomes.append(Outcome(part.name, outcome, seconds, commands, said, result))
            print(f"{part.name}: {outcome}, {seconds:.0f} s", file=sys.stderr, flush=True)
            report = {"machine": asdict(self.machine), "parts": [asdict(each) for each in self.outcomes]}
            write_text(self.out / "report.json", json.dumps(report, indent=2) + "\n")
            write_text(self.out / "report.md", self.report())

    def run_together(self, parts: Sequence[Part]) -> None:
        with ThreadPoolExecutor(len(parts) or 1) as threads:
            try:
                list(threads.map(self.run, parts))
            except BaseException:
                self.end = 0.0  # for those that still run
                raise

    def _run_commands(self, part: Part, end: float) -> str:
        program = str(part.commands[0][0])
        if shutil.which(program) is None:
            self._log(part, "err").write_text(f"{program} is not installed\n")
            return NOT_RUN
        for command in part.commands:
            # What the last command prints is the report.
            with self._log(part, "out").open("w") as output, self._log(part, "err").open("a") as errors:
                process = subprocess.Popen(
                    [str(word) for word in command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    env={**os.environ, **part.environment},
                    start_new_session=True,
                )
                try:
                    # Looked at again and again, because Ctrl-C makes the end earlier.
                    while process.poll() is None:
                        if time.monotonic() >= min(end, self.end):
                            print("ended for want of time", file=errors)
                            return TIMED_OUT
                        time.sleep(0.1)
                finally:
                    end_group(process)
            if process.returncode:
                return FAILED
        return PASSED

    def report(self) -> str:
        """What was run, and what the measurements printed, in Markdown."""
        rows = [("part", "", "seconds", ""), ("---", "---", "---:", "---")]
        rows += [(each.name, each.outcome, f"{each.seconds:.0f}", each.said) for each in self.outcomes]
        lines = [str(self.machine), ""]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        for each in self.outcomes:
            if each.result is not None:
                printed = (self.logs / f"{file_name(each.name)}.out").read_text("utf-8").strip()
                lines += ["", f"## {each.name}", "", "```", printed, "```"]
        return "\n".join(lines) + "\n"

    def _last_line(self, part: Part, outcome: str) -> str:
        """What says best how it went: an error, or the end of what was printed."""
        if outcome == PASSED and part.result:
            return ""
        output, errors = (self._lines(part, kind) for kind in ("out", "err"))
        said = [line for line in errors if line.startswith("error: ")] if outcome == FAILED else []
        return (said or output or errors or [""])[-1][:200]

    def _lines(self, part: Part, kind: str) -> list[str]:
        log = self._log(part, kind)
        text = log.read_text("utf-8", errors="replace") if log.exists() else ""
        return [line for line in text.splitlines() if line.strip()]

    def _log(self, part: Part, kind: str) -> Path:
        return self.logs / f"{file_name(part.name)}.{kind}"


def file_name(part: str) -> str:
    return part.replace(", ", "_").replace(" ", "_")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started: as Ctrl-C does, and after a while with SIGKILL."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)


def main() -> None:
    options = _build_parser().parse_args()
    out: Path = options.output_dir
    if (options.teacher is None) != (options.text is None):
        raise UserError("--teacher and --text go together; give both, or neither")
    for flag, path in [("text", path) for path in options.text or ()] + [("task", options.task)]:
        if path and not path.exists():
            raise UserError(f"there is no {path}; check --{flag}")
    if not 0 < options.minutes <= 24 * 60:
        raise UserError("--minutes must be above 0, and a day at the most")
    check_unoccupied(out)
    # After the parsing, because importing torch takes seconds.
    import torch

    from distilspeed.kernels.profiling.machine import Machine

    quiet_libraries()
    if not (options.smoke or torch.cuda.is_available()):
        raise UserError("PyTorch sees no GPU here; run it where there is one, or with --smoke")
    with writing(out):
        (out / "logs").mkdir(parents=True)
        plan = Plan(out, options.teacher, options.text, options.task, SMOKE if options.smoke else Sizes())
        plan.write_inputs()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runner = Runner(out, Machine.here(device), 60 * options.minutes)
    runner.run(plan.preparation())
    runner.run_together([part for part in plan.untimed() if part.group in options.parts])
    for part in plan.timed():
        if part.group in options.parts:
            runner.run(part)
    print(runner.report())
    if any(each.outcome in (FAILED, TIMED_OUT) for each in runner.outcomes):
        sys.exit(1)


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="launch/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, metavar="DIR", help="made by this command")
    add("--teacher", metavar="DIR", help="to distil: a BERT masked language model with its tokenizer")
    add("--text", type=Path, nargs="+", metavar="FILE", help="to distil it on")
    add("--task", type=Path, metavar="DIR", help="to fine-tune on, as for launch/evaluate.py")
    add("--parts", nargs="+", choices=GROUPS, default=GROUPS, help="default all")
    add("--minutes", type=float, default=10.0, help="after which what runs is ended; default 10")
    add("--smoke", action="store_true", help="everything in small, on a CPU, too: no measurements")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    run_command(main)
