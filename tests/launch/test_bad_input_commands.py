"""Bad input to every command but launch/train.py: status 2, one line that names it, nothing created or changed.

Each case is a command line, given in the folder of malformed files that bad_inputs.py writes, and a part of the line
that it gets.
"""

import fcntl
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import LONG_NAME, SENTENCE, write_inputs
from refusals import refusal, snapshot

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.recognition import READ_BYTES
from distilspeed.trainer.corpus.writer import RowWriter

TEXT = "--tokenizer tokenizer --seq_length 64 --num_proc 1 --output_dir out/corpus --text"
DATASET = "--tokenizer tokenizer --seq_length 64 --num_proc 1 --output_dir out/corpus --dataset"
PREPARE_TEXT = [
    ("latin1.txt", "latin1.txt is not UTF-8 at byte 4; convert it"),
    ("utf16.txt", "utf16.txt is not UTF-8 at byte 0;"),
    ("utf16_without_mark.txt", "utf16_without_mark.txt is binary or UTF-16: byte 1 is 0;"),
    ("cut.txt", f"cut.txt is not UTF-8 at byte {len(SENTENCE) + 1};"),
    ("far.txt", f"far.txt is not UTF-8 at byte {40_000 * (len(SENTENCE) + 1)};"),
    ("straddling.txt", f"straddling.txt is not UTF-8 at byte {READ_BYTES + 1};"),
    ("nul.txt", f"nul.txt is binary or UTF-16: byte {len(SENTENCE) + 1} is 0;"),
    ("program.bin", "program.bin is "),
    ("packed.jsonl.zst", "packed.jsonl.zst cannot be unpacked: "),
    ("cut.txt.gz", "cut.txt.gz cannot be unpacked: Compressed file ended before the end-of-stream marker"),
    ("cut.txt.gz --shard 0/2", "cut.txt.gz cannot be unpacked: "),
    ("empty.txt.gz", "empty.txt.gz is empty"),
    ("blank.txt.gz", "blank.txt.gz holds no text"),
    ("latin1.txt.xz", "latin1.txt.xz is not UTF-8 at byte 4;"),
    ("endless.txt.gz", "endless.txt.gz has a line of more than 64 MiB at byte 0;"),
    (
        "twice.txt.gz",
        "twice.txt.gz is not UTF-8 at byte 1; convert it to UTF-8, or unpack it if it is an archive",
    ),
    ("tar.tar.gz", "or unpack it if it is an archive"),
    ("dump.xml.bz2", "dump.xml.bz2 is XML, HTML, RTF or PDF, not plain text; extract its text first"),
    ("wiki_00", "wiki_00 is XML, HTML, RTF or PDF"),
    ("page.HTM", "page.HTM is XML, HTML, RTF or PDF"),
    ("table.csv", "table.csv is a table; put it into a folder of its own and give that as --dataset"),
    ("TABLE.TSV.gz", "TABLE.TSV.gz is a table;"),
    ("good.parquet.gz", "good.parquet.gz is a compressed Parquet file; unpack it"),
    ("records.txt", "records.txt, which begins like JSON, line 2 is not JSON"),
    ("records", "records, which begins like JSON, line 2 has no field 'text' but body;"),
    ("records.json.gz", "records.json.gz, line 1 has no field 'text' but body;"),
    (
        "sentences.txt --document_separator blank_line",
        "sentences.txt has a document of more than 64 Mi characters",
    ),
    (
        "good.jsonl good.parquet --document_separator blank_line",
        "blank_line needs a plain text file among --text",
    ),
    ("endless.txt", "endless.txt has a line of more than 64 MiB"),
    ("endless.jsonl", "endless.jsonl has a line of more than 64 MiB"),
    ("''", "there is no text file .;"),
    ("empty.txt", "empty.txt is empty"),
    ("mark.txt", "mark.txt holds no text"),
    ("blank.txt", "blank.txt holds no text"),
    ("words.txt", "the text fills 0 row(s) of 64 tokens"),
    ("unknown.txt", "the text fills 0 row(s) of 64 tokens"),
    ("few.txt", "the text fills 1 row(s) of 64 tokens, too few for training and held-out rows"),
    ("good.txt empty.txt", "empty.txt is empty"),
    ("good.txt blank.txt", "blank.txt holds no text"),
    ("occupied", "there is no text file occupied; check --text (a folder goes with --dataset)"),
    ("nowhere.txt", "there is no text file nowhere.txt;"),
    ("good.txt/part", "there is no text file good.txt/part;"),
    ("loop", "there is no text file loop;"),
    ("dangling", "there is no text file dangling;"),
    (LONG_NAME, "File name too long; check --text"),
    ("pipe", "there is no text file pipe;"),
    ("latin1.jsonl", "latin1.jsonl is not UTF-8 at byte 14;"),
    ("broken.jsonl", "broken.jsonl, line 2 is not JSON"),
    ("other.jsonl", "line 2 has no field 'text' but body;"),
    ("number.jsonl", "number.jsonl holds int where text is expected"),
    ("string.jsonl", "string.jsonl, line 1 is not an object"),
    ("STRING.NDJSON.GZ", "STRING.NDJSON.GZ, line 1 is not an object"),
    ("deep.jsonl", "deep.jsonl is not JSON"),
    ("deep.json", "deep.json is not JSON"),
    ("digits.jsonl", "digits.jsonl, line 1 is not JSON"),
    ("cut.json", "cut.json is not JSON"),
    ("other.json", "other.json, record 1 has no field 'text' but body;"),
    ("objects.json", "objects.json, record 1 is not an object"),
    ("array.json", "array.json holds no text"),
    ("latin1.json --shard 0/2", "latin1.json is not UTF-8 at byte"),
    ("latin1.json --shard 1/2", "latin1.json is not UTF-8 at byte"),
    ("broken.parquet", "broken.parquet cannot be read"),
    ("cut.parquet", "cut.parquet cannot be read"),
    ("damaged.parquet", "damaged.parquet cannot be read"),
    ("good.parquet --text_column body", "has no field 'body' but text, number"),
    ("good.parquet --text_column number", "good.parquet holds int where text is expected"),
]
PREPARE_DATASET = [
    ("nobody/nothing", "the dataset nobody/nothing cannot be read"),
    ("''", "names no dataset"),
    (":config", "names no dataset"),
    ("a:b:c:d", "not NAME[:CONFIG[:SPLIT]]"),
    ("json", "the dataset json cannot be read"),
    ("void", "the dataset void cannot be read"),
    ("good.txt", "good.txt is a file; give it as --text"),
    ("loop", "the dataset loop cannot be read"),
    (LONG_NAME, "File name too long; check --text and --dataset"),
    ("saved", "has no field 'text' but body"),
    ("saved::test --text_column body", "without splits"),
    ("splits::test --text_column body", "splits::test cannot be read"),
    ("saved_broken", "saved_broken cannot be read"),
    ("saved_cut --text_column body", "saved_cut cannot be read"),
    ("scripted", "scripted cannot be read"),
    ("pickled", "pickled cannot be read"),
    ("data::test", "data::test cannot be read"),
    ("data_broken", "data_broken cannot be read"),
    ("data --document_separator blank_line", "blank_line needs a plain text file among --text"),
]
PREPARE = "--text good.txt --tokenizer tokenizer --seq_length 64 --num_proc 1 --output_dir out/corpus"
PREPARE_OPTIONS = [
    ("--tokenizer nowhere", "the tokenizer nowhere cannot be loaded"),
    ("--tokenizer ''", "--tokenizer is missing;"),
    ("--tokenizer void", "the tokenizer void cannot be loaded"),
    ("--tokenizer good.txt", "the tokenizer good.txt cannot be loaded"),
    ("--tokenizer no_mask", "the tokenizer no_mask has no mask token"),
    ("--tokenizer no_pad", "the tokenizer no_pad has no pad token"),
    ("--tokenizer slow_tokenizer", "slow_tokenizer has no fast tokenizer"),
    ("--tokenizer tokenizer_not_json", "the tokenizer tokenizer_not_json cannot be loaded"),
    ("--tokenizer tokenizer_empty", "the tokenizer tokenizer_empty cannot be loaded"),
    ("--tokenizer tokenizer_latin1", "the tokenizer tokenizer_latin1 cannot be loaded"),
    ("--tokenizer tokenizer_cut", "the tokenizer tokenizer_cut cannot be loaded"),
    (
        "--tokenizer cased_vocabulary",
        "lower-cases text, but 28 of its vocabulary's 54 pieces of letters have capitals",
    ),
    ("--seq_length 0", "--seq_length 0 is not between 16 and the tokenizer's limit of 512"),
    ("--seq_length -64", "--seq_length -64 is not between 16"),
    ("--seq_length 15", "--seq_length 15 is not between 16"),
    ("--seq_length 513", "--seq_length 513 is not between 16"),
    ("--seq_length 1000000000 --tokenizer limitless_tokenizer", "--seq_length 1000000000 is not between 16"),
    ("--tokenizer no_vocabulary", "the tokenizer no_vocabulary has no vocabulary"),
    ("--seq_length long", "argument --seq_length: invalid int value: 'long'"),
    ("--seq_length 64.5", "argument --seq_length: invalid int value: '64.5'"),
    ("--held_out_fraction 0", "--held_out_fraction must be above 0 and below 0.5"),
    ("--held_out_fraction 0.5", "--held_out_fraction must be above 0 and below 0.5"),
    ("--held_out_fraction -0.1", "--held_out_fraction must be above 0"),
    ("--held_out_fraction nan", "--held_out_fraction is nan; give a finite number"),
    ("--held_out_fraction half", "argument --held_out_fraction: invalid float value"),
    ("--num_proc 0", "--num_proc must be at least 1"),
    ("--num_proc -2", "--num_proc must be at least 1"),
    ("--num_proc all", "argument --num_proc: invalid int value: 'all'"),
    ("--shard /", "--shard '/' is not I/N"),
    ("--shard 1", "--shard '1' is not I/N"),
    ("--shard 1/2/3", "--shard '1/2/3' is not I/N"),
    ("--shard a/b", "--shard 'a/b' is not I/N"),
    ("--shard=-1/4", "--shard '-1/4' is not I/N"),
    ("--shard 4/4", "there is no shard 4/4"),
    ("--shard 1/0", "there is no shard 1/0"),
    ("--output_dir occupied", "occupied exists already"),
    ("--output_dir good.txt", "good.txt exists already"),
    ("--output_dir occupied/notes.txt/corpus", "cannot write occupied/notes.txt/corpus"),
    ("--output_dir loop", "loop exists already"),
    ("--output_dir dangling", "dangling exists already"),
    ("--output_dir link_to_void", "link_to_void exists already"),
    ("--output_dir loop/corpus", "loop/corpus cannot be made: Too many levels of symbolic links"),
    (f"--output_dir {LONG_NAME}", "File name too long"),
    ("--dataset data --output_dir data", "data exists already"),
    ("--dataset data --output_dir data/corpus", "data/corpus is inside the dataset data"),
    ("--dataset .::train --output_dir out/corpus", "out/corpus is inside the dataset .::train"),
    ("--document_separator paragraph", "argument --document_separator: invalid choice: 'paragraph'"),
    ("--texts good.txt", "unrecognized arguments: --texts"),
    ("--merge shard0 shard1", "--merge takes --output_dir and nothing else"),
]
PREPARE_MERGE = [
    ("shard0", "shard 1/2 is missing"),
    ("shard0 shard0", "are both shard 0/2"),
    ("shard0 shard0_again", "are both shard 0/2"),
    ("shard0 shard1_of_3", "one of 2 shards and shard1_of_3 one of 3"),
    ("shard0 shard1_shorter", "differ in seq_length: 64 and 32"),
    ("shard0_lines shard1_paragraphs", "differ in document_separator: line and blank_line"),
    ("shard0 shard1_more", "differ in sources: good.txt and good.txt, good.txt"),
    ("shard0 shard1_tokenizer", "differ in tokenizer_hash"),
    ("shard0_old shard1_old", "shard0_old was prepared with other versions"),
    ("shard0 shard1_damaged", "the content of train/data.arrow has changed"),
    ("corpus", "corpus is no shard but a whole corpus"),
    ("shard0 nowhere", "nowhere is not a prepared corpus"),
    ("shard0 good.txt", "good.txt is not a prepared corpus"),
    ("shard0 loop", "loop"),
    ("shard0 shard1 --output_dir shard1", "shard1 exists already"),
    ("shard0 shard1 --output_dir loop", "loop exists already"),
    ("shard0 shard1 --output_dir good.txt/corpus", "cannot write good.txt/corpus"),
    ("", "argument --merge: expected at least one argument"),
]
EVALUATE = "--teacher teacher --student student --data_dir corpus --output_dir out/evaluation --device cpu"
EVALUATE_OPTIONS = [
    ("--teacher nowhere", "cannot load the teacher nowhere"),
    ("--student nobody/nothing", "cannot load the student nobody/nothing"),
    ("--baseline void", "cannot load the baseline void"),
    ("--student good.txt", "cannot load the student good.txt"),
    ("--student loop", "cannot load the student loop"),
    ("--student headless", "the student headless lacks weights"),
    ("--student small_vocabulary", "the student small_vocabulary has a vocabulary of 500 tokens"),
    ("--student short", "the student short only 32 positions"),
    ("--teacher roberta", 'the teacher roberta is a "roberta" model'),
    ("--student pickled_weights", "convert them: "),
    ("--student nan_weights", "the student nan_weights has NaN or infinite weights"),
    ("--student cut_weights", "cannot load the student cut_weights"),
    ("--student no_config", "cannot load the student no_config"),
    ("--student config_not_json", "cannot load the student config_not_json"),
    ("--student other_tokenizer", "another tokenizer than that of the student other_tokenizer"),
    *(
        (f"--{role} other_vocabulary", f"another tokenizer than that of the {role} other_vocabulary")
        for role in ("teacher", "student", "baseline")
    ),
    ("--teacher said_untied", "the teacher said_untied lacks cls.predictions.decoder.bias, "),
    ("--teacher decoder", "the teacher decoder has is_decoder"),
    (
        "--baseline head_dropout --task tasks/good",
        "the baseline head_dropout makes no AutoModelForSequenceClassification: dropout probability",
    ),
    ("--student no_vocabulary", "the tokenizer no_vocabulary has no vocabulary"),
    ("--data_dir nowhere", "nowhere is not a prepared corpus"),
    ("--data_dir void", "void is not a prepared corpus"),
    ("--data_dir good.txt", "good.txt is not a prepared corpus"),
    ("--data_dir corpus_cut", "the corpus corpus_cut is damaged: train/data.arrow has 1000 bytes"),
    ("--data_dir corpus_no_manifest", "the corpus corpus_no_manifest is damaged: manifest.json"),
    ("--data_dir corpus_without_counts", "token_counts.npy is missing"),
    ("--task nowhere", "cannot read nowhere/train.jsonl"),
    ("--task loop", "cannot read loop/train.jsonl"),
    ("--task good.txt", "cannot read good.txt/train.jsonl"),
    ("--task tasks/no_dev", "cannot read tasks/no_dev/dev.jsonl"),
    ("--task tasks/no_label", 'tasks/no_label/train.jsonl, line 1 needs "text"'),
    ("--task tasks/label_list", 'tasks/label_list/train.jsonl, line 1 needs "text"'),
    ("--task tasks/label_empty", 'tasks/label_empty/train.jsonl, line 1 needs "text"'),
    ("--task tasks/label_fraction", "label_fraction/train.jsonl, line 1 has the label 0.5, a score,"),
    ("--task tasks/label_nan", "label_nan/train.jsonl, line 1 has the label NaN, a score,"),
    ("--task tasks/label_score", 'label_score/train.jsonl, line 1 has the label "3.5", a score,'),
    ("--task tasks/label_exponent", 'line 1 has the label "-1e-3", a score,'),
    ("--task tasks/unlabelled", "8 of 8 examples in tasks/unlabelled/train.jsonl have the label -1"),
    ("--task tasks/unlabelled_dev", '1 of 1 examples in tasks/unlabelled_dev/dev.jsonl have the label "-"'),
    ("--task tasks/minus_one", "1 of 9 examples in tasks/minus_one/train.jsonl have the label -1"),
    ("--task tasks/kinds", 'tasks/kinds mixes labels of different kinds (1 and "1")'),
    ("--task tasks/kinds_in_dev", 'tasks/kinds_in_dev mixes labels of different kinds (1 and "1")'),
    ("--task tasks/booleans", "tasks/booleans mixes labels of different kinds (1 and true)"),
    ("--task tasks/text_number", 'tasks/text_number/train.jsonl, line 1 needs "text"'),
    ("--task tasks/one_class", "task tasks/one_class have the label 1"),
    ("--task tasks/new_class", "dev.jsonl of the task tasks/new_class has labels that train.jsonl lacks (7)"),
    ("--task tasks/mixed", "tasks/mixed mixes"),
    ("--task tasks/empty_dev", "tasks/empty_dev/dev.jsonl is empty"),
    ("--task tasks/not_json", "tasks/not_json/dev.jsonl, line 1 is not JSON"),
    ("--task tasks/deep", "tasks/deep/dev.jsonl, line 1 is not JSON"),
    ("--task tasks/array", "tasks/array/dev.jsonl, line 1 is not an object"),
    ("--task tasks/half_pair", 'tasks/half_pair/dev.jsonl, line 1 needs "text"'),
    ("--task tasks/latin1", "tasks/latin1/dev.jsonl is not UTF-8"),
    ("--task tasks/good --task more/good", "two --task folders have the same name"),
    ("--max_rows 0", "--max_rows must be at least 1"),
    ("--max_rows many", "argument --max_rows: invalid int value: 'many'"),
    ("--task_epochs 0", "--task_epochs must be at least 1"),
    ("--task_seeds -1", "--task_seeds must be at least 1"),
    ("--task_batch_size 0", "--task_batch_size must be at least 1"),
    ("--task_learning_rate nan", "--task_learning_rate is nan; give a finite number"),
    ("--task_learning_rate 0", "--task_learning_rate must be above 0 and below 1"),
    ("--seed -1", "--seed must be at least 0 and at most 4,294,967,295"),
    ("--seed 4294967296", "--seed must be at least 0"),
    ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    ("--output_dir occupied", "occupied exists already"),
    ("--output_dir good.txt", "good.txt exists already"),
    ("--output_dir corpus", "corpus exists already"),
    ("--output_dir loop", "loop exists already"),
    ("--output_dir link_to_void", "link_to_void exists already"),
    ("--output_dir good.txt/evaluation", "good.txt/evaluation cannot be made"),
]
PROFILE = "--tokens 32 --vocab_size 100 --hidden_size 16 --device cpu"
PROFILE_OPTIONS = [
    ("--tokens 0", "--tokens must be at least 1"),
    ("--tokens -4", "--tokens must be at least 1"),
    ("--tokens 1e3", "argument --tokens: invalid int value: '1e3'"),
    ("--tokens 1000000000", "use fewer --tokens"),
    ("--vocab_size 0", "--vocab_size must be at least 1"),
    ("--hidden_size 0", "--hidden_size must be at least 1"),
    ("--repeats 0", "--repeats must be at least 1"),
    ("--temperature 0", "--temperature must be a positive number"),
    ("--temperature nan", "--temperature must be a positive number"),
    ("--temperature inf", "--temperature must be a positive number"),
    ("--dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
    ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    ("--peers apex", "--peers must be of compile, eager, liger, or none"),
    ("--peers ''", "--peers must be of compile, eager, liger, or none"),
    ("--output_dir occupied", "occupied exists already"),
    ("--output_dir loop", "loop exists already"),
    ("--output_dir good.txt/profile", "cannot write good.txt/profile"),
    ("--trace", "--trace writes to a folder; give --output_dir"),
    ("--tune", "--tune goes with --vocab_size only; leave out --"),
]
BENCHMARK = (
    "--deepspeed_config good_config.json --teacher teacher --data_dir corpus "
    "--train_batch_size 16 --per_device_train_batch_size 8"
)
BENCHMARK_OPTIONS = [
    ("--teacher none", "give a --teacher"),
    ("--teacher nowhere", "cannot load the teacher nowhere"),
    ("--data_dir void", "void is not a prepared corpus"),
    ("--deepspeed_config nowhere.json", "cannot read the DeepSpeed config nowhere.json"),
    ("--deepspeed_config not_json.json", "the DeepSpeed config not_json.json is not valid JSON"),
    ("--deepspeed_config fp16_and_bf16.json", 'enables both "fp16" and "bf16"'),
    ("--train_batch_size 17", "train_batch_size 17 cannot be divided into micro-batch 8 x 1 ranks"),
    ("--train_batch_size 0", "--train_batch_size must be above 0"),
    ("--rounds 0", "--rounds must be at least 1"),
    ("--rounds few", "argument --rounds: invalid int value: 'few'"),
    ("--ranks 0", "--ranks must be at least 1"),
    ("--ranks 1,3", "train_batch_size 16 cannot be divided into micro-batch 8 x 3 ranks"),
    ("--ranks two", "argument --ranks: invalid whole_numbers value: 'two'"),
    ("--output result.json", "result.json exists already"),
    ("--output occupied", "occupied exists already"),
    ("--output loop", "loop exists already"),
    ("--output nowhere/result.json", "nowhere/result.json cannot be made"),
    ("--output good.txt/result.json", "good.txt/result.json cannot be made"),
    (f"--output {LONG_NAME}", "File name too long"),
    ("--check nowhere.json", "nowhere.json is no stored benchmark"),
    ("--check result.json", "result.json is no stored benchmark"),
    ("--check not_json.json", "not_json.json is no stored benchmark"),
    ("--contestant theirs", "argument --contestant: invalid choice: 'theirs'"),
]
BENCHMARK_PREPARATION = [
    ("--text nowhere.txt", "there is no text file nowhere.txt"),
    ("--text occupied", "there is no text file occupied"),
    ("--text empty.txt", "empty.txt is empty"),
    ("--text blank.txt", "blank.txt holds no text"),
    ("--text latin1.txt", "latin1.txt is not UTF-8 at byte 4"),
    ("--tokenizer nowhere", "the tokenizer nowhere cannot be loaded"),
    ("--tokenizer no_mask", "the tokenizer no_mask has no mask token"),
    ("--seq_length 15", "--seq_length 15 is not between 16"),
    ("--num_proc 0", "--num_proc must be at least 1"),
    ("--rounds 0", "--rounds must be at least 1"),
    ("--output result.json", "result.json exists already"),
    ("--output nowhere/result.json", "nowhere/result.json cannot be made"),
]
QUICKSTART_DATA = [
    ("--output_dir occupied", "occupied exists already"),
    ("--output_dir good.txt", "good.txt exists already"),
    ("--output_dir loop", "loop exists already"),
    ("--output_dir good.txt/data", "cannot write good.txt/data"),
    ("--output_dir out/data --seq_length 15", "--seq_length must be at least 16"),
]
GPU_CHECK = [
    ("--output_dir occupied", "occupied exists already"),
    ("--output_dir loop", "loop exists already"),
    ("--output_dir good.txt/check", "cannot write good.txt/check"),
    ("--teacher teacher", "--teacher and --text go together"),
    ("--teacher nowhere --text good.txt", "there is no nowhere; check --teacher"),
    ("--text good.txt", "--teacher and --text go together"),
    ("--teacher teacher --text nowhere.txt", "there is no nowhere.txt; check --text"),
    ("--task nowhere", "there is no nowhere; check --task"),
    ("--minutes 0", "--minutes must be above 0"),
    ("--minutes nan", "--minutes is nan; give a finite number"),
    ("--parts speed", "argument --parts: invalid choice: 'speed'"),
]
NOTHING_GIVEN = [
    ("prepare_data.py", "", "the following arguments are required: --output_dir"),
    ("prepare_data.py", "--tokenizer tokenizer --output_dir out", "give --text or --dataset"),
    ("prepare_data.py", "--text good.txt --output_dir out", "--tokenizer is missing;"),
    (
        "evaluate.py",
        "",
        "the following arguments are required: --teacher, --student, --data_dir, --output_dir",
    ),
    ("benchmark.py", "", "the following arguments are required: --deepspeed_config, --teacher, --data_dir"),
    ("benchmark_preparation.py", "", "the following arguments are required: --text, --tokenizer"),
    ("quickstart_data.py", "", "the following arguments are required: --output_dir"),
    ("gpu_check.py", "", "the following arguments are required: --output_dir"),
]
CASES = [
    *NOTHING_GIVEN,
    *(
        (command, f"{options} {arguments}", said)
        for command, options, table in (
            ("prepare_data.py", TEXT, PREPARE_TEXT),
            ("prepare_data.py", DATASET, PREPARE_DATASET),
            ("prepare_data.py", PREPARE, PREPARE_OPTIONS),
            ("prepare_data.py", "--output_dir out/corpus --merge", PREPARE_MERGE),
            ("evaluate.py", EVALUATE, EVALUATE_OPTIONS),
            ("profile_kernels.py", PROFILE, PROFILE_OPTIONS),
            ("benchmark.py", BENCHMARK, BENCHMARK_OPTIONS),
            ("benchmark_preparation.py", "--text good.txt --tokenizer tokenizer", BENCHMARK_PREPARATION),
            ("quickstart_data.py", "", QUICKSTART_DATA),
            ("gpu_check.py", "--smoke --output_dir out", GPU_CHECK),
        )
        for arguments, said in table
    ),
]


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory,
    reference_text: Path,
    small_tokenizer_dir: Path,
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, reference_text, small_tokenizer_dir, tiny_teacher_dir, small_corpus_dir)
    return folder


@pytest.fixture(autouse=True)
def _as_a_command(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the folder, without network; signal handlers as they were."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # Called, these fail: what is refused is refused before anything is measured.
    monkeypatch.setattr("distilspeed.trainer.evaluation.comparison._measure", None)
    monkeypatch.setattr("distilspeed.trainer.throughput.measurement.compare", None)
    monkeypatch.setattr("distilspeed.kernels.profiling.profile.profile_kernels", None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("command", "arguments", "said"), CASES)
def test_a_command_refuses(
    command: str,
    arguments: str,
    said: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    line = refusal(command, [*shlex.split(arguments)], inputs, monkeypatch, capfd)
    assert said in line
    assert "; " in line or " must be " in line, "it does not say what to do"


# --- a build of prepare_data.py that was interrupted ----------------------------------------------------


@pytest.fixture
def interrupted(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a build of half/corpus that Ctrl-C ended after its first rows; goes after the test."""
    with monkeypatch.context() as patch:
        patch.setattr("distilspeed.trainer.corpus.pool.BATCH_CHARACTERS", 20_000)
        patch.setattr("distilspeed.trainer.corpus.unfinished.SECONDS_BETWEEN_RECORDS", 0.0)
        add, batches = RowWriter.add, itertools.count()

        def interrupt(writer: RowWriter, batch: Any) -> None:
            add(writer, batch)
            if next(batches):
                raise KeyboardInterrupt

        patch.setattr(RowWriter, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(
                CorpusArguments(
                    text=(Path("good.txt"),),
                    tokenizer="tokenizer",
                    seq_length=64,
                    output_dir=Path("half/corpus"),
                    num_proc=1,
                )
            )
    yield inputs / "half" / "corpus.incomplete"
    shutil.rmtree(inputs / "half")


@pytest.mark.parametrize(
    ("damage", "arguments", "said"),
    [
        ("", "", "half/corpus.incomplete holds an unfinished build; go on with --resume"),
        ("", "--resume --seq_length 32", "was begun with seq_length 64, not 32"),
        ("", "--resume --text few.txt", "was begun with sources"),
        (
            "",
            "--resume --document_separator blank_line",
            "begun with document_separator line, not blank_line",
        ),
        (
            "",
            "--resume --tokenizer limitless_tokenizer --held_out_fraction 0.2",
            "was begun with held_out_fraction",
        ),
        ("progress.json: {", "--resume", "half/corpus.incomplete cannot be gone on with"),
        ("progress.json: []", "--resume", "half/corpus.incomplete cannot be gone on with"),
        ("progress.json: \xff", "--resume", "half/corpus.incomplete cannot be gone on with"),
        (
            'progress.json: {"recipe": {}, "written": {}}',
            "--resume",
            "half/corpus.incomplete cannot be gone on with",
        ),
        ("train/data.arrow: ", "--resume", "half/corpus.incomplete is damaged: its rows are cut short"),
        ("locked", "--resume", "another process is preparing half/corpus"),
    ],
)
def test_prepare_data_refuses_to_go_on(
    damage: str,
    arguments: str,
    said: str,
    inputs: Path,
    interrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    lock = os.open(interrupted, os.O_RDONLY)
    if damage == "locked":
        fcntl.flock(lock, fcntl.LOCK_EX)
    elif damage:
        name, content = damage.split(": ", maxsplit=1)
        (interrupted / name).write_bytes(content.encode("latin-1"))
    options = f"{PREPARE} --output_dir half/corpus {arguments}"
    assert said in refusal("prepare_data.py", shlex.split(options), inputs, monkeypatch, capfd)
    os.close(lock)


# --- the shell scripts ----------------------------------------------------------------------------------

# In a checkout without .venv, so that a script that refuses nothing installs nothing.
SCRIPTS = [
    ("quickstart.sh --nonsense", "unknown argument --nonsense;"),
    ("quickstart.sh $'two\\nlines'", "unknown argument two lines;"),
    ("quickstart.sh --output_dir", "--output_dir needs a value;"),
    ("quickstart.sh --teacher somebody/bert", "--teacher needs text;"),
    ("quickstart.sh --dataset somebody/text", "--dataset and --text go with --teacher;"),
    ("quickstart.sh --output_dir ../good.txt", "cannot make the folder ../good.txt;"),
    ("quickstart.sh --output_dir ../good.txt/run", "cannot make the folder ../good.txt/run;"),
    ("quickstart.sh --output_dir ../loop", "cannot make the folder ../loop;"),
    ("quickstart.sh --output_dir ''", "cannot make the folder ;"),
    ("quickstart.sh --deepspeed_config nowhere.json", "there is no DeepSpeed config nowhere.json;"),
    ("quickstart.sh --deepspeed_config ../occupied", "there is no DeepSpeed config ../occupied;"),
    ("quickstart.sh --num_train_epochs three", "--num_train_epochs is 'three';"),
    ("quickstart.sh --num_train_epochs 0", "--num_train_epochs is '0';"),
    ("quickstart.sh --num_train_epochs -1", "--num_train_epochs is '-1';"),
    ("quickstart.sh --output_dir ../void", "Python 3.11 or newer is needed;"),
    ("test.sh", "Python 3.11 or newer is needed;"),
    ("v100x8.sh --plan", "distilspeed is not installed for /nowhere/python;"),
    ("NUM_GPUS=0 v100x8.sh --plan", "NUM_GPUS is '0';"),
    ("NUM_GPUS=8x v100x8.sh --plan", "NUM_GPUS is '8x';"),
    ("NUM_GPUS=-1 v100x8.sh --plan", "NUM_GPUS is '-1';"),
    ("MASTER_PORT=http v100x8.sh --plan", "MASTER_PORT is 'http';"),
    ("MASTER_PORT=65536 v100x8.sh --plan", "MASTER_PORT is '65536';"),
    ("multi_node.sh --plan", "--hostfile is needed;"),
    ("multi_node.sh --hostfile", "--hostfile needs a value;"),
    ("multi_node.sh --hostfile ../hosts --plan", "distilspeed is not installed for /nowhere/python;"),
    ("multi_node.sh --hostfile ../hosts --master_port 0", "--master_port is '0';"),
    ("multi_node.sh --hostfile ../hosts --master_port 29500x", "--master_port is '29500x';"),
    ("multi_node.sh --hostfile nowhere --plan", "cannot read the hostfile nowhere;"),
    ("multi_node.sh --hostfile ../occupied --plan", "cannot read the hostfile ../occupied;"),
    ("multi_node.sh --hostfile ../loop --plan", "cannot read the hostfile ../loop;"),
    ("multi_node.sh --hostfile ../hosts_empty --plan", "names no host;"),
    ("multi_node.sh --hostfile ../hosts_without_slots --plan", "has the line 'host1 ';"),
    ("multi_node.sh --hostfile ../hosts_zero --plan", "has the line 'host1 slots=0';"),
    ("multi_node.sh --hostfile ../hosts_word --plan", "has the line 'host1 slots=two';"),
    ("multi_node.sh --hostfile ../hosts_twice --plan", "names host1 twice;"),
    ("multi_node.sh --hostfile ../hosts_windows --plan", "has the line 'host1 slots=1 ';"),
    ("multi_node.sh --hostfile ../hosts_option --plan", "has the line '-oProxyCommand=touch"),
    ("multi_node.sh --hostfile ../hosts_quote --plan", "has the line 'ho\"st slots=1';"),
    ("multi_node.sh --hostfile ../hosts_binary --plan", "has the line "),
    ("slurm.sbatch --plan", "this is no Slurm job;"),
    ("SLURM_JOB_ID=7 slurm.sbatch --plan", "this is no Slurm job;"),
    (
        "SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=/nowhere PATH=../bin:$PATH slurm.sbatch --plan",
        "/nowhere has no launch/job.sh;",
    ),
    ("SLURM_JOB_ID=7 MASTER_PORT=x PATH=../bin:$PATH slurm.sbatch --plan", "MASTER_PORT is 'x';"),
    (
        "SLURM_JOB_ID=7 PATH=../bin:$PATH slurm.sbatch --plan",
        "distilspeed is not installed for /nowhere/python;",
    ),
]


@pytest.mark.parametrize(("command", "said"), SCRIPTS)
def test_a_script_refuses(command: str, said: str, inputs: Path) -> None:
    command = re.sub(r"(\w+\.(sh|sbatch))", r"bash launch/\1", command, count=1)
    hidden = ("SLURM_", "MASTER_", "NUM_GPUS", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    before = snapshot(inputs)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=inputs / "checkout",
        env=environment | {"PYTHON": "/nowhere/python"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=600,
        check=False,
    )
    lines = done.stderr.decode(errors="replace").splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, b"", 1), (done.returncode, done.stdout, lines)
    assert said in lines[0]
    assert lines[0].startswith("error: ")
    assert snapshot(inputs) == before
