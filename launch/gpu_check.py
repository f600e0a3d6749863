"""Check kernels and trainer on this machine's GPU, unattended, in ten minutes.

    bash launch/gpu_check.sh --output_dir DIR [--teacher DIR --text FILE... [--task DIR]]

Runs the tests that need a GPU, some of them also under compute-sanitizer. Profiles the kernels. Measures training of a
model of BERT-base's shape against the eager recipe, also under a V100's limits. Distils your own teacher, or a small
one that is trained first. A failed part does not stop the others. Prints report.md, and writes it with report.json and
the parts' files to the output folder. The status is 1 if a part failed.
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
# Time limits of a part; they scale with --minutes.
SECONDS_OF_TESTS, SECONDS_OF_MEASUREMENT = 300.0, 120.0


@dataclass(frozen=True, kw_only=True)
class GpuCheckArguments(Settings):
    """The command line of ``launch/gpu_check.sh``."""

    output_dir: Path = setting(metavar="DIR", help="a new folder")
    teacher: Path | None = setting(
        None, metavar="DIR", help="teacher to distil: a BERT masked language model with its tokenizer"
    )
    text: tuple[Path, ...] = setting((), metavar="FILE", help="text to distil the teacher on")
    task: Path | None = setting(None, metavar="DIR", help="task to fine-tune on, as for launch/evaluate.py")
    parts: tuple[str, ...] = setting(
        GROUPS, action="store", choices=GROUPS, help="parts to run; default: all"
    )
    minutes: float = setting(MINUTES, above=0, at_most=24 * 60, help="time limit of the whole check")
    smoke: bool = setting(
        False, help="run everything at small sizes, also on a CPU; the measurements mean nothing"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.teacher is None) != (not self.text):
            raise UserError("missing-argument", "--teacher and --text need each other; give both or neither")


@dataclass(frozen=True)
class Sizes:
    """The sizes of the check; the defaults are for a modern GPU.

    test_processes   pytest's workers, which share the GPU and spend most of their time compiling; 0 for none
    rows, dtypes, vocab_size, hidden_size, peers, repeats    the kernels' profiles
    precision        precision of all training
    zero_stages, accumulation, rounds    the measured training
    micro_batches    the measured training: rows per micro-batch, by row length
    measured         the measured teacher's config values that differ from BERT-base's
    v100_batch       rows per step of the V100 recipe
    teacher_steps    training steps of the small teacher
    steps            training steps of student and baseline
    batch            rows per step of teacher, student and baseline
    task_epochs      epochs of fine-tuning
    """

    test_processes: int = 4
    rows: tuple[int, ...] = (4096, 16384)
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    vocab_size: int = 30522
    hidden_size: int = 768
    peers: str = "eager,compile,liger,nemo"
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


# Small sizes, for any machine.
SMOKE = Sizes(
    test_processes=0,  # without a GPU the tests are skipped, and a worker costs more than they do
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
    """The parts of the check; they write all their files to the output folder."""

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
        """Write the DeepSpeed configs and the measured training's teacher, which has random weights."""
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
        processes = self.sizes.test_processes
        in_parallel = ["-n", processes] if processes and find_spec("xdist") else []
        # PyTorch and Triton handle some CUDA calls that fail; those are not memory errors.
        memcheck: list[object] = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no"]
        memcheck += ["--error-exitcode", 1, *pytest, "-m", "gpu and memcheck", kernels]
        # One allocation per tensor, so that memcheck finds reads beyond a tensor's end.
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
        """Return the first ZeRO stage at every row length, then without compiling, the V100 recipe, other stages."""
        sizes, longest = self.sizes, max(self.sizes.micro_batches)
        parts = []
        for stage in sizes.zero_stages:
            for length, micro_batch in sizes.micro_batches.items():
                name, batch = f"training, rows of {length}, ZeRO-{stage}", sizes.accumulation * micro_batch
                parts.append(self._benchmark(name, length, stage, micro_batch, batch))
        v100 = self._benchmark("V100 recipe", longest, 1, 8, sizes.v100_batch, "--as_v100")
        micro_batch = sizes.micro_batches[longest]
        name, batch = f"training, rows of {longest}, not compiled", sizes.accumulation * micro_batch
        plain = self._benchmark(name, longest, sizes.zero_stages[0], micro_batch, batch, "--compile", "off")
        first = len(sizes.micro_batches)
        return [*parts[:first], plain, v100, *parts[first:]]

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
        """Return the command of a training with one process, which needs no launcher."""
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
    """Exit, which ends the running parts; ignore further signals, so that they do not interrupt it."""
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
        raise UserError("no-gpu", "PyTorch finds no GPU; run this on a machine with a GPU, or with --smoke")
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
    """Run the parts that are not timed in parallel, then the measurements one by one."""
    together: list[Sequence[Part]] = [[part] for part in plan.tests()] if TESTS in groups else []
    if TRAINING in groups or DISTILLATION in groups:
        plan.write_inputs()
        together.append([plan.preparation(), *([plan.distillation()] if DISTILLATION in groups else [])])
    runner.run_together(*together)
    # The most important measurements come first, because time may run out.
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
