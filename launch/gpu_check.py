"""Prove kernels and trainer on this machine's GPU, unattended, in ten minutes.

    bash launch/gpu_check.sh --output_dir DIR [--teacher DIR --text FILE... [--task DIR]]

Runs the tests that need a GPU, some of them under compute-sanitizer, too; profiles the kernels; measures the training
of a model of BERT-base's shape against the eager recipe, also under a V100's limits; and distils for real, a teacher
of yours or a small one that is trained first. A part that fails stops no other. Prints report.md, and writes it with
report.json and the parts' own files. Status 1 if a part failed.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.files import check_unoccupied, write_text, writing
from distilspeed.trainer.job.arguments import Settings, setting
from distilspeed.trainer.job.command import quiet_libraries, run_command
from distilspeed.trainer.job.processes import STOP_SIGNALS, stop_signals
from distilspeed.trainer.throughput.check_runner import Part, Runner, file_name

ROOT = Path(__file__).resolve().parents[1]
TESTS, KERNELS, TRAINING, DISTILLATION = GROUPS = ("tests", "kernels", "training", "distillation")
MINUTES = 10.0
# That a part may take; with other --minutes in proportion.
SECONDS_OF_TESTS, SECONDS_OF_MEASUREMENT = 300.0, 120.0
# So many test processes share the GPU: most of their time is compiling.
TEST_PROCESSES = 4


@dataclass(frozen=True, kw_only=True)
class GpuCheckArguments(Settings):
    """The command line of ``launch/gpu_check.sh``."""

    output_dir: Path = setting(metavar="DIR", help="made by this command")
    teacher: Path | None = setting(
        None, metavar="DIR", help="to distil: a BERT masked language model with its tokenizer"
    )
    text: tuple[Path, ...] = setting((), metavar="FILE", help="to distil it on")
    task: Path | None = setting(None, metavar="DIR", help="to fine-tune on, as for launch/evaluate.py")
    parts: tuple[str, ...] = setting(GROUPS, action="store", choices=GROUPS, help="what to run; default all")
    minutes: float = setting(MINUTES, above=0, at_most=24 * 60, help="after which what runs is ended")
    smoke: bool = setting(False, help="everything in small, on a CPU, too: no measurements")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.teacher is None) != (not self.text):
            raise UserError("missing-argument", "--teacher and --text go together; give both, or neither")


@dataclass(frozen=True)
class Sizes:
    """How much is done; the defaults are for a modern GPU.

    rows, dtypes, vocab_size, hidden_size, peers, repeats    of the kernels' profiles
    precision        of all training
    zero_stages, micro_batches, accumulation, rounds    of the measured training: for each length of rows, how many
                     are in a micro-batch
    measured         config of its teacher, where it is not BERT-base's
    v100_batch       rows of a step of the V100 recipe
    teacher_steps, steps, batch    of the teacher that is trained, of student and baseline, and the rows of their steps
    task_epochs      of fine-tuning
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
    rounds: int = 3
    measured: Mapping[str, Any] = field(default_factory=dict)
    v100_batch: int = 128
    teacher_steps: int = 800
    steps: int = 400
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
    rounds=1,
    measured={
        "vocab_size": 2048,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    v100_batch=16,
    teacher_steps=4,
    steps=4,
    batch=32,
    task_epochs=1,
)


class Plan:
    """The parts of the check; all their files are in the output folder."""

    def __init__(self, arguments: GpuCheckArguments, sizes: Sizes) -> None:
        self.out = arguments.output_dir
        self.sizes, self.task = sizes, arguments.task
        self.makes_teacher = arguments.teacher is None
        self.data = self.out / "data"
        self.text = arguments.text or (self.data / "text.txt",)
        self.tokenizer = arguments.teacher or self.data / "tokenizer"
        self.teacher = arguments.teacher or self.out / "teacher" / "student"
        self.measured_teacher = self.out / "measured_teacher"

    def write_inputs(self) -> None:
        """The DeepSpeed configs, and the teacher of the measured training, with random weights."""
        from transformers import BertConfig, BertForMaskedLM

        for stage in {1, *self.sizes.zero_stages}:
            config = json.loads((ROOT / "ds_configs" / "v100x8_fp16.json").read_text(encoding="utf-8"))
            config |= {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
            config["fp16"]["enabled"] = self.sizes.precision == "fp16"
            config["zero_optimization"]["stage"] = stage
            write_text(self.config(stage), json.dumps(config, indent=2) + "\n")
        config = BertConfig(**self.sizes.measured)
        if not self.makes_teacher:
            config.vocab_size = max(config.vocab_size, BertConfig.from_pretrained(self.teacher).vocab_size)
        BertForMaskedLM(config).save_pretrained(self.measured_teacher)

    def preparation(self) -> Part:
        commands = [self._prepare(length) for length in self.sizes.micro_batches]
        if self.makes_teacher:
            longest = max(self.sizes.micro_batches)
            commands.insert(
                0, script("quickstart_data.py", "--seq_length", longest, "--output_dir", self.data)
            )
        return Part("preparation", SECONDS_OF_TESTS, commands)

    def tests(self) -> list[Part]:
        folders = (os.path.relpath(ROOT / "tests" / name) for name in ("kernels", "trainer", "launch"))
        kernels, *trainer = folders
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        in_parallel = ["-n", TEST_PROCESSES] if find_spec("xdist") else []
        # Calls that fail and are dealt with, as PyTorch's and Triton's do, are no error of memory.
        memcheck: list[object] = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no"]
        memcheck += ["--error-exitcode", 1, *pytest, "-m", "gpu and memcheck", kernels]
        # An allocation of its own for every tensor, so that reading beyond one is found.
        no_pool = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [
            Part("tests of the kernels", SECONDS_OF_TESTS, [[*pytest, "-m", "gpu", *in_parallel, kernels]]),
            Part("tests of the trainer", SECONDS_OF_TESTS, [[*pytest, "-m", "gpu", *in_parallel, *trainer]]),
            Part("memcheck of the kernels", SECONDS_OF_TESTS, [memcheck], environment=no_pool),
        ]

    def distillation(self) -> Part:
        sizes = self.sizes
        without = ["--teacher", "none", "--student_config"]
        commands = [
            self._train("distilled", sizes.steps, "--teacher", self.teacher),
            self._train("baseline", sizes.steps, *without, self.out / "distilled" / "student"),
        ]
        if self.makes_teacher:
            config = self.data / "teacher_config.json"
            commands.insert(0, self._train("teacher", sizes.teacher_steps, *without, config))
        return Part("distillation", SECONDS_OF_TESTS, commands)

    def evaluation(self) -> Part:
        folder, corpus = self.out / "evaluation", self.corpus(min(self.sizes.micro_batches))
        what = ["--teacher", self.teacher, "--student", self.out / "distilled" / "student"]
        what += ["--baseline", self.out / "baseline" / "student", "--data_dir", corpus]
        if self.task:
            what += ["--task", self.task, "--task_epochs", self.sizes.task_epochs]
        evaluate = script("evaluate.py", *what, "--output_dir", folder)
        return Part("evaluation", SECONDS_OF_MEASUREMENT, [evaluate], folder / "report.json")

    def training(self) -> list[Part]:
        """One of each length and the V100 recipe, then those at other ZeRO stages."""
        sizes, longest = self.sizes, max(self.sizes.micro_batches)
        parts = []
        for stage in sizes.zero_stages:
            for length, micro_batch in sizes.micro_batches.items():
                name, batch = f"training, rows of {length}, ZeRO-{stage}", sizes.accumulation * micro_batch
                parts.append(self._benchmark(name, length, stage, micro_batch, batch))
        v100 = self._benchmark("V100 recipe", longest, 1, 8, sizes.v100_batch, "--as_v100")
        first = len(sizes.micro_batches)
        return [*parts[:first], v100, *parts[first:]]

    def profiles(self) -> list[Part]:
        return [self._profile(rows, dtype) for dtype in self.sizes.dtypes for rows in self.sizes.rows]

    def config(self, stage: int) -> Path:
        return self.out / f"zero{stage}.json"

    def corpus(self, length: int) -> Path:
        return self.out / f"corpus_{length}"

    def _prepare(self, length: int) -> list[object]:
        what = ["--text", *self.text, "--tokenizer", self.tokenizer, "--seq_length", length]
        what += ["--held_out_fraction", 0.05, "--output_dir", self.corpus(length)]
        return script("prepare_data.py", *what)

    def _train(self, name: str, steps: int, *teacher: object) -> list[object]:
        """As a job of one process, which needs no launcher."""
        batch, corpus = self.sizes.batch, self.corpus(min(self.sizes.micro_batches))
        what = ["--deepspeed_config", self.config(1), "--data_dir", corpus, *teacher, "--max_steps", steps]
        what += ["--train_batch_size", batch, "--per_device_train_batch_size", batch // 2, *workers()]
        return script("train.py", *what, "--output_dir", self.out / name)

    def _benchmark(
        self, name: str, length: int, stage: int, micro_batch: int, batch: int, *more: object
    ) -> Part:
        what = ["--deepspeed_config", self.config(stage), "--teacher", self.measured_teacher, *more]
        what += ["--data_dir", self.corpus(length), "--train_batch_size", batch]
        what += ["--per_device_train_batch_size", micro_batch, "--rounds", self.sizes.rounds]
        what += workers()
        result = self.out / f"{file_name(name)}.json"
        benchmark = script("benchmark.py", *what, "--output", result)
        return Part(name, SECONDS_OF_MEASUREMENT, [benchmark], result)

    def _profile(self, rows: int, dtype: str) -> Part:
        sizes, folder = self.sizes, self.out / f"kernels_{rows}_{dtype}"
        what = ["--tokens", rows, "--vocab_size", sizes.vocab_size, "--hidden_size", sizes.hidden_size]
        what += ["--dtype", dtype, "--peers", sizes.peers, "--repeats", sizes.repeats, "--output_dir", folder]
        name, profile = f"kernels, {rows} rows, {dtype}", script("profile_kernels.py", *what)
        return Part(name, SECONDS_OF_MEASUREMENT, [profile], folder / "profile.json")


def workers() -> list[object]:
    return ["--dataloader_num_workers", min(4, (os.cpu_count() or 1) - 1)]


def script(name: str, *arguments: object) -> list[object]:
    return [sys.executable, os.path.relpath(ROOT / "launch" / name), *arguments]


def stop(number: int, _frame: object) -> NoReturn:
    """Leave once, and take along what runs: a second signal must not interrupt that."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    from distilspeed.trainer.job.parser import CommandParser

    (arguments,) = CommandParser(GpuCheckArguments, prog="launch/gpu_check.sh", description=__doc__).parse()
    _check(arguments)
    # After the parsing, because importing torch takes seconds.
    import torch

    from distilspeed.kernels.profiling.machine import Machine

    has_gpu = torch.cuda.is_available()
    if not (arguments.smoke or has_gpu):
        raise UserError("no-gpu", "PyTorch sees no GPU here; run it where there is one, or with --smoke")
    sizes = SMOKE if arguments.smoke else Sizes()
    if has_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        sizes = replace(sizes, dtypes=("fp16",))
    quiet_libraries()
    for number in stop_signals():
        signal.signal(number, stop)
    with writing(arguments.output_dir):
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        machine = Machine.here(torch.device("cuda" if has_gpu else "cpu"))
        runner = Runner(arguments.output_dir, machine, 60 * arguments.minutes, arguments.minutes / MINUTES)
        run_all(Plan(arguments, sizes), runner, arguments.parts)
    print(runner.report(), end="")
    sys.exit(0 if runner.all_passed else 1)


def run_all(plan: Plan, runner: Runner, groups: Sequence[str]) -> None:
    """First what is not timed, at the same time; then the measurements, with nothing beside them."""
    together: list[Sequence[Part]] = [[part] for part in plan.tests()] if TESTS in groups else []
    if TRAINING in groups or DISTILLATION in groups:
        plan.write_inputs()
        together.append([plan.preparation(), *([plan.distillation()] if DISTILLATION in groups else [])])
    runner.run_together(*together)
    # What tells most comes first: time may run out.
    training = plan.training() if TRAINING in groups else []
    first = len(plan.sizes.micro_batches) + 1
    runner.run(*([plan.evaluation()] if DISTILLATION in groups else []), *training[:first])
    runner.run(*(plan.profiles() if KERNELS in groups else []), *training[first:])


def _check(arguments: GpuCheckArguments) -> None:
    given = [
        ("teacher", arguments.teacher),
        ("task", arguments.task),
        *(("text", path) for path in arguments.text),
    ]
    for flag, path in given:
        if path and not path.exists():
            raise UserError("missing-file", f"there is no {path}; check --{flag}")
    check_unoccupied(arguments.output_dir)


if __name__ == "__main__":
    run_command(main)
