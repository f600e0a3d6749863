"""Measure launch/prepare_data.py against DistilBERT's own preparation on the same text: time, tokens/s and memory.

    python launch/benchmark_preparation.py --text gutenberg.txt --tokenizer google-bert/bert-base-uncased \\
        --output launch/benchmarks/preparation.json

The original recipe encodes one line at a time, keeps all lines in memory, shuffles and pickles them, and counts the
tokens of the pickle. Both run as separate commands, taking turns. Seconds are for the whole command, imports included.
Memory is the highest sum of the resident sets of a command's processes, sampled ten times a second; a page that
several processes share counts in each.
"""

import json
import pickle
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.files import check_new_file, write_text
from distilspeed.trainer.job.arguments import Settings, setting
from distilspeed.trainer.job.command import run_command

SECONDS_BETWEEN_SAMPLES = 0.1
SMALL_TEXT_BYTES = 10_000_000  # a prefix of the text, whose memory is compared with that of the whole text


@dataclass(frozen=True, kw_only=True)
class BenchmarkPreparationArguments(Settings):
    """The command line of ``launch/benchmark_preparation.py``."""

    text: Path = setting(metavar="FILE", help="text, one document per line")
    tokenizer: str = setting(metavar="ID_OR_DIR", help="a BERT tokenizer: a hub name or a folder")
    seq_length: int = setting(128, help="tokens per row, in our preparation")
    num_proc: int = setting(2, at_least=1, metavar="N", help="processes of our preparation")
    rounds: int = setting(3, at_least=1, metavar="N", help="rounds to measure")
    output: Path | None = setting(None, metavar="FILE", help="also write the results as JSON")


@dataclass(frozen=True)
class Round:
    """One run of one command.

    of_counting  seconds of the original's second script, token_counts.py
    """

    seconds: float
    of_counting: float
    tokens: int
    peak_memory_bytes: int
    tokenizer_class: str


@dataclass(frozen=True)
class Rounds:
    """Rounds of both preparations on the same text, taking turns."""

    text_bytes: int
    original: list[Round]
    ours: list[Round]

    def ratio(self) -> float:
        """Return how many times faster ours is: the median of the rounds."""
        return statistics.median(before.seconds / now.seconds for before, now in self._pairs())

    def ratio_without_counting(self) -> float:
        """Return the ratio without the seconds of the original's counting."""
        return statistics.median(
            (before.seconds - before.of_counting) / now.seconds for before, now in self._pairs()
        )

    def _pairs(self) -> list[tuple[Round, Round]]:
        return list(zip(self.original, self.ours, strict=True))


def original_recipe(text: Path, tokenizer_name: str, output_dir: Path) -> None:
    """Write a pickle of the lines' token ids and one of token counts; print the values for :class:`Round`."""
    import numpy as np
    from transformers import BertTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # no warnings about lines longer than the model's maximum
    tokenizer = BertTokenizer.from_pretrained(tokenizer_name)
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    with text.open(encoding="utf-8") as file:
        lines = file.readlines()
    encoded = []
    for line in lines:
        encoded.append(tokenizer.encode(f"{cls} {line.strip()} {sep}", add_special_tokens=False))
    sequences = [np.uint16(token_ids) for token_ids in encoded]
    random.shuffle(sequences)
    with (output_dir / "sequences.pickle").open("wb") as file:
        pickle.dump(sequences, file, protocol=pickle.HIGHEST_PROTOCOL)

    before_counting = time.perf_counter()
    with (output_dir / "sequences.pickle").open("rb") as file:
        sequences = pickle.load(file)
    counter: Counter[int] = Counter()
    for sequence in sequences:
        counter.update(sequence)
    counts = [counter[token] for token in range(tokenizer.vocab_size)]
    with (output_dir / "counts.pickle").open("wb") as file:
        pickle.dump(counts, file, protocol=pickle.HIGHEST_PROTOCOL)
    print(json.dumps([sum(counts), time.perf_counter() - before_counting, class_of(tokenizer)]))


def class_of(tokenizer: object) -> str:
    bases = [base.__name__ for base in type(tokenizer).__mro__[1:3]]
    return f"{type(tokenizer).__module__}.{type(tokenizer).__name__} ({', '.join(bases)})"


def run_original(text: Path, tokenizer: str, folder: Path) -> Round:
    seconds, peak, output = _run([str(Path(__file__)), "original", str(text), tokenizer, str(folder)])
    tokens, of_counting, tokenizer_class = json.loads(output.splitlines()[-1])
    return Round(seconds, of_counting, tokens, peak, tokenizer_class)


def run_ours(text: Path, tokenizer: str, folder: Path, seq_length: int, num_proc: int) -> Round:
    from distilspeed.trainer.corpus.format import open_corpus

    command = [
        str(Path(__file__).with_name("prepare_data.py")),
        "--text",
        str(text),
        "--tokenizer",
        tokenizer,
    ]
    command += ["--seq_length", str(seq_length), "--num_proc", str(num_proc)]
    seconds, peak, _ = _run([*command, "--output_dir", str(folder / "corpus")])
    corpus = open_corpus(folder / "corpus")
    counts = corpus.manifest.counts
    tokens = counts.train_tokens + counts.held_out_tokens
    return Round(seconds, 0.0, tokens, peak, class_of(corpus.load_tokenizer()))


def _run(command: list[str]) -> tuple[float, int, str]:
    """Run a Python command; return its seconds, the peak memory of its processes in bytes, and its output."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _memory_of_tree(process.pid))
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    seconds = time.perf_counter() - start
    output = process.stdout.read() if process.stdout else ""
    if process.returncode == UserError.status:  # the command has printed its error
        sys.exit(process.returncode)
    if process.returncode:
        raise UserError(
            "failed-step",
            f"{' '.join(command[:2])} failed with status {process.returncode}; see its error above",
        )
    return seconds, peak, output


def _memory_of_tree(pid: int) -> int:
    """Return the resident bytes of a process and its descendants."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # the process ended meanwhile
        return 0
    return pages * resource.getpagesize() + sum(map(_memory_of_tree, children))


def check_input(arguments: BenchmarkPreparationArguments) -> None:
    """Raise UserError for input that our preparation refuses; the original does not check its input."""
    from distilspeed.trainer.corpus.arguments import CorpusArguments
    from distilspeed.trainer.corpus.build import open_input

    with tempfile.TemporaryDirectory() as work:  # nothing is written there
        open_input(
            CorpusArguments(
                tokenizer=arguments.tokenizer,
                output_dir=Path(work) / "corpus",
                text=(arguments.text,),
                seq_length=arguments.seq_length,
                num_proc=arguments.num_proc,
            )
        )


def measure_in_turns(arguments: BenchmarkPreparationArguments) -> list[Rounds]:
    with tempfile.TemporaryDirectory() as work:
        small = Path(work) / "small.txt"
        with arguments.text.open("rb") as file:
            small.write_bytes(file.read(SMALL_TEXT_BYTES).rpartition(b"\n")[0] + b"\n")
        texts = (
            [small, arguments.text] if arguments.text.stat().st_size > SMALL_TEXT_BYTES else [arguments.text]
        )
        comparisons = [Rounds(text.stat().st_size, [], []) for text in texts]
        for _ in range(arguments.rounds):
            for text, comparison in zip(texts, comparisons, strict=True):
                folder = Path(work) / "run"
                folder.mkdir()
                comparison.original.append(run_original(text, arguments.tokenizer, folder))
                comparison.ours.append(
                    run_ours(text, arguments.tokenizer, folder, arguments.seq_length, arguments.num_proc)
                )
                shutil.rmtree(folder)
    return comparisons


def table(comparisons: list[Rounds]) -> str:
    lines = [f"{'text':>8} {'':9} {'seconds':>8} {'tokens':>12} {'tokens/s':>10} {'peak memory':>12}"]
    for comparison in comparisons:
        for name, rounds in (("original", comparison.original), ("ours", comparison.ours)):
            seconds = statistics.median(one.seconds for one in rounds)
            peak = max(one.peak_memory_bytes for one in rounds)
            lines.append(
                f"{comparison.text_bytes / 1e6:>5.0f} MB {name:9} {seconds:>8.1f} {rounds[0].tokens:>12,} "
                f"{rounds[0].tokens / seconds:>10,.0f} {peak / 2**20:>8.0f} MiB"
            )
        lines.append(
            f"{'':8} {comparison.ratio():.1f} times faster; {comparison.ratio_without_counting():.1f} times "
            "without the original's counting"
        )
    classes = {one.tokenizer_class for comparison in comparisons for one in comparison.original}
    return "\n".join([*lines, f"original's tokenizer: {', '.join(sorted(classes))}"])


def main() -> None:
    from distilspeed.trainer.job.parser import CommandParser

    (arguments,) = CommandParser(
        BenchmarkPreparationArguments, prog="launch/benchmark_preparation.py", description=__doc__
    ).parse()
    if arguments.output:
        check_new_file(arguments.output)
    # After the parsing, because importing torch takes seconds.
    import torch

    from distilspeed.kernels.profiling.machine import Machine
    from distilspeed.trainer.corpus.writer import installed_versions

    check_input(arguments)
    machine = Machine.here(torch.device("cpu"))
    comparisons = measure_in_turns(arguments)
    print(f"{table(comparisons)}\n{machine.cpu}, {machine.cores} cores; {machine.date}")
    if arguments.output:
        record = {
            "text": arguments.text.name,
            "seq_length": arguments.seq_length,
            "num_proc": arguments.num_proc,
            "comparisons": [
                asdict(comparison)
                | {"ratio": comparison.ratio(), "ratio_without_counting": comparison.ratio_without_counting()}
                for comparison in comparisons
            ],
            "seconds_are": "of the whole command, imports included",
            "memory_is": f"highest sum of the processes' resident sets, every {SECONDS_BETWEEN_SAMPLES} s",
            "versions": installed_versions(),
            "machine": asdict(machine) | {"command": _without_folders(machine.command)},
        }
        write_text(arguments.output, json.dumps(record, indent=2) + "\n")


def _without_folders(command: str) -> str:
    return " ".join(Path(word).name if word.startswith("/") else word for word in command.split())


if __name__ == "__main__":
    if sys.argv[1:2] == ["original"]:
        original_recipe(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        run_command(main)
