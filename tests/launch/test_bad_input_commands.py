"""Bad input to every command except launch/train.py: status 2, one line that names it, nothing created or changed.

A case is a command line, the code of its error, and the names that the error's line must contain. The commands run in
the folder of malformed files that bad_inputs.py writes.
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
from user_errors import assert_names

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.recognition import READ_BYTES
from distilspeed.trainer.corpus.writer import RowWriter

TEXT = "--tokenizer tokenizer --seq_length 64 --num_proc 1 --output_dir out/corpus --text"
DATASET = "--tokenizer tokenizer --seq_length 64 --num_proc 1 --output_dir out/corpus --dataset"
PREPARE_TEXT = [
    ("latin1.txt", "not-utf8", "latin1.txt", "byte 4"),
    ("utf16.txt", "not-utf8", "utf16.txt", "byte 0"),
    ("utf16_without_mark.txt", "not-utf8", "utf16_without_mark.txt", "byte 1"),
    ("cut.txt", "not-utf8", "cut.txt", f"byte {len(SENTENCE) + 1}"),
    ("far.txt", "not-utf8", "far.txt", f"byte {40_000 * (len(SENTENCE) + 1)}"),
    ("straddling.txt", "not-utf8", "straddling.txt", f"byte {READ_BYTES + 1}"),
    ("nul.txt", "not-utf8", "nul.txt", f"byte {len(SENTENCE) + 1}"),
    ("program.bin", "not-utf8", "program.bin"),
    ("packed.jsonl.zst", "unreadable-file", "packed.jsonl.zst"),
    ("cut.txt.gz", "unreadable-file", "cut.txt.gz"),
    ("cut.txt.gz --shard 0/2", "unreadable-file", "cut.txt.gz"),
    ("empty.txt.gz", "no-text", "empty.txt.gz"),
    ("blank.txt.gz", "no-text", "blank.txt.gz"),
    ("latin1.txt.xz", "not-utf8", "latin1.txt.xz", "byte 4"),
    ("endless.txt.gz", "line-too-long", "endless.txt.gz", "64", "byte 0"),
    (
        "twice.txt.gz",
        "not-utf8",
        "twice.txt.gz",
        "byte 1",
    ),
    ("tar.tar.gz", "not-utf8"),
    ("dump.xml.bz2", "not-plain-text", "dump.xml.bz2"),
    ("wiki_00", "not-plain-text", "wiki_00"),
    ("page.HTM", "not-plain-text", "page.HTM"),
    ("table.csv", "not-plain-text", "table.csv", "--dataset"),
    ("TABLE.TSV.gz", "not-plain-text", "TABLE.TSV.gz"),
    ("good.parquet.gz", "not-plain-text", "good.parquet.gz"),
    ("records.txt", "not-json", "records.txt", "line 2"),
    ("records", "missing-field", "records", "line 2"),
    ("records.json.gz", "missing-field", "records.json.gz", "line 1"),
    (
        "sentences.txt --document_separator blank_line",
        "line-too-long",
        "sentences.txt",
        "64",
    ),
    (
        "good.jsonl good.parquet --document_separator blank_line",
        "conflicting-arguments",
        "blank_line",
        "--text",
    ),
    ("endless.txt", "line-too-long", "endless.txt", "64"),
    ("endless.jsonl", "line-too-long", "endless.jsonl", "64"),
    ("''", "missing-file"),
    ("empty.txt", "no-text", "empty.txt"),
    ("mark.txt", "no-text", "mark.txt"),
    ("blank.txt", "no-text", "blank.txt"),
    ("words.txt", "not-enough-text", "64"),
    ("unknown.txt", "not-enough-text", "64"),
    ("few.txt", "not-enough-text", "64"),
    ("good.txt empty.txt", "no-text", "empty.txt"),
    ("good.txt blank.txt", "no-text", "blank.txt"),
    ("occupied", "missing-file", "occupied", "--text", "--dataset"),
    ("nowhere.txt", "missing-file", "nowhere.txt"),
    ("good.txt/part", "missing-file", "good.txt/part"),
    ("loop", "missing-file", "loop"),
    ("dangling", "missing-file", "dangling"),
    (LONG_NAME, "unreadable-file", "--text"),
    ("pipe", "missing-file", "pipe"),
    ("latin1.jsonl", "not-utf8", "latin1.jsonl", "byte 14"),
    ("broken.jsonl", "not-json", "broken.jsonl", "line 2"),
    ("other.jsonl", "missing-field", "line 2"),
    ("number.jsonl", "bad-record", "number.jsonl"),
    ("string.jsonl", "bad-record", "string.jsonl", "line 1"),
    ("STRING.NDJSON.GZ", "bad-record", "STRING.NDJSON.GZ", "line 1"),
    ("deep.jsonl", "not-json", "deep.jsonl"),
    ("deep.json", "not-json", "deep.json"),
    ("digits.jsonl", "not-json", "digits.jsonl", "line 1"),
    ("cut.json", "not-json", "cut.json"),
    ("other.json", "missing-field", "other.json", "record 1"),
    ("objects.json", "bad-record", "objects.json", "record 1"),
    ("array.json", "no-text", "array.json"),
    ("latin1.json --shard 0/2", "not-utf8", "latin1.json"),
    ("latin1.json --shard 1/2", "not-utf8", "latin1.json"),
    ("broken.parquet", "unreadable-file", "broken.parquet"),
    ("cut.parquet", "unreadable-file", "cut.parquet"),
    ("damaged.parquet", "unreadable-file", "damaged.parquet"),
    ("good.parquet --text_column body", "missing-field", "body"),
    ("good.parquet --text_column number", "bad-record", "good.parquet"),
]
PREPARE_DATASET = [
    ("nobody/nothing", "unusable-dataset", "nobody/nothing"),
    ("''", "bad-argument"),
    (":config", "bad-argument"),
    ("a:b:c:d", "bad-argument"),
    ("json", "unusable-dataset", "json"),
    ("void", "unusable-dataset", "void"),
    ("good.txt", "bad-argument", "good.txt", "--text"),
    ("loop", "unusable-dataset", "loop"),
    (LONG_NAME, "unreadable-file", "--text", "--dataset"),
    ("saved", "missing-field"),
    ("saved::test --text_column body", "unusable-dataset"),
    ("splits::test --text_column body", "unusable-dataset", "splits::test"),
    ("saved_broken", "unusable-dataset", "saved_broken"),
    ("saved_cut --text_column body", "unusable-dataset", "saved_cut"),
    ("scripted", "unusable-dataset", "scripted"),
    ("pickled", "unusable-dataset", "pickled"),
    ("data::test", "unusable-dataset", "data::test"),
    ("data_broken", "unusable-dataset", "data_broken"),
    ("data --document_separator blank_line", "conflicting-arguments", "blank_line", "--text"),
]
PREPARE = "--text good.txt --tokenizer tokenizer --seq_length 64 --num_proc 1 --output_dir out/corpus"
PREPARE_OPTIONS = [
    ("--tokenizer nowhere", "unusable-tokenizer", "nowhere"),
    ("--tokenizer ''", "missing-argument", "--tokenizer"),
    ("--tokenizer void", "unusable-tokenizer", "void"),
    ("--tokenizer good.txt", "unusable-tokenizer", "good.txt"),
    ("--tokenizer no_mask", "unusable-tokenizer", "no_mask"),
    ("--tokenizer no_pad", "unusable-tokenizer", "no_pad"),
    ("--tokenizer slow_tokenizer", "unusable-tokenizer", "slow_tokenizer"),
    ("--tokenizer tokenizer_not_json", "unusable-tokenizer", "tokenizer_not_json"),
    ("--tokenizer tokenizer_empty", "unusable-tokenizer", "tokenizer_empty"),
    ("--tokenizer tokenizer_latin1", "unusable-tokenizer", "tokenizer_latin1"),
    ("--tokenizer tokenizer_cut", "unusable-tokenizer", "tokenizer_cut"),
    (
        "--tokenizer cased_vocabulary",
        "unusable-tokenizer",
        "lower-cases",
        "28",
        "54",
    ),
    ("--seq_length 0", "bad-argument", "--seq_length", "16", "512"),
    ("--seq_length -64", "bad-argument", "--seq_length", "-64", "16"),
    ("--seq_length 15", "bad-argument", "--seq_length", "15", "16"),
    ("--seq_length 513", "bad-argument", "--seq_length", "513", "16"),
    (
        "--seq_length 1000000000 --tokenizer limitless_tokenizer",
        "bad-argument",
        "--seq_length",
        "1000000000",
        "16",
    ),
    ("--tokenizer no_vocabulary", "unusable-tokenizer", "no_vocabulary"),
    ("--seq_length long", "bad-argument", "--seq_length", "long"),
    ("--seq_length 64.5", "bad-argument", "--seq_length", "64.5"),
    ("--held_out_fraction 0", "bad-argument", "--held_out_fraction"),
    ("--held_out_fraction 0.5", "bad-argument", "--held_out_fraction"),
    ("--held_out_fraction -0.1", "bad-argument", "--held_out_fraction"),
    ("--held_out_fraction nan", "bad-argument", "--held_out_fraction", "nan"),
    ("--held_out_fraction half", "bad-argument", "--held_out_fraction"),
    ("--num_proc 0", "bad-argument", "--num_proc"),
    ("--num_proc -2", "bad-argument", "--num_proc"),
    ("--num_proc all", "bad-argument", "--num_proc", "all"),
    ("--shard /", "bad-argument", "--shard", "/", "I/N"),
    ("--shard 1", "bad-argument", "--shard", "I/N"),
    ("--shard 1/2/3", "bad-argument", "--shard", "1/2/3", "I/N"),
    ("--shard a/b", "bad-argument", "--shard", "a/b", "I/N"),
    ("--shard=-1/4", "bad-argument", "--shard", "-1/4", "I/N"),
    ("--shard 4/4", "bad-argument", "4/4"),
    ("--shard 1/0", "bad-argument", "1/0"),
    ("--output_dir occupied", "output-exists", "occupied"),
    ("--output_dir good.txt", "output-exists", "good.txt"),
    ("--output_dir occupied/notes.txt/corpus", "unwritable-output", "occupied/notes.txt/corpus"),
    ("--output_dir loop", "output-exists", "loop"),
    ("--output_dir dangling", "output-exists", "dangling"),
    ("--output_dir link_to_void", "output-exists", "link_to_void"),
    ("--output_dir loop/corpus", "unwritable-output", "loop/corpus"),
    (f"--output_dir {LONG_NAME}", "unwritable-output"),
    ("--dataset data --output_dir data", "output-exists", "data"),
    ("--dataset data --output_dir data/corpus", "output-inside-input", "data/corpus", "data"),
    ("--dataset .::train --output_dir out/corpus", "output-inside-input", "out/corpus"),
    ("--document_separator paragraph", "bad-argument", "--document_separator", "paragraph"),
    ("--texts good.txt", "bad-argument", "--texts"),
    ("--merge shard0 shard1", "conflicting-arguments", "--merge", "--output_dir"),
]
PREPARE_MERGE = [
    ("shard0", "shard-mismatch", "1/2"),
    ("shard0 shard0", "shard-mismatch", "0/2"),
    ("shard0 shard0_again", "shard-mismatch", "0/2"),
    ("shard0 shard1_of_3", "shard-mismatch", "shard1_of_3"),
    ("shard0 shard1_shorter", "shard-mismatch", "seq_length", "64", "32"),
    ("shard0_lines shard1_paragraphs", "shard-mismatch", "document_separator", "blank_line"),
    ("shard0 shard1_more", "shard-mismatch", "good.txt"),
    ("shard0 shard1_tokenizer", "shard-mismatch", "tokenizer_hash"),
    ("shard0_old shard1_old", "shard-mismatch", "shard0_old"),
    ("shard0 shard1_damaged", "damaged-corpus", "train/data.arrow"),
    ("corpus", "shard-mismatch", "corpus"),
    ("shard0 nowhere", "not-a-corpus", "nowhere"),
    ("shard0 good.txt", "not-a-corpus", "good.txt"),
    ("shard0 loop", "damaged-corpus", "loop"),
    ("shard0 shard1 --output_dir shard1", "output-exists", "shard1"),
    ("shard0 shard1 --output_dir loop", "output-exists", "loop"),
    ("shard0 shard1 --output_dir good.txt/corpus", "unwritable-output", "good.txt/corpus"),
    ("", "bad-argument", "--merge"),
]
EVALUATE = "--teacher teacher --student student --data_dir corpus --output_dir out/evaluation --device cpu"
EVALUATE_OPTIONS = [
    ("--teacher nowhere", "unusable-model", "nowhere"),
    ("--student nobody/nothing", "unusable-model", "nobody/nothing"),
    ("--baseline void", "unusable-model", "void"),
    ("--baseline scratch=void", "unusable-model", "scratch void"),
    ("--baseline student --baseline student", "conflicting-arguments", "--baseline", "NAME"),
    ("--baseline teacher=student", "conflicting-arguments", "teacher"),
    ("--student good.txt", "unusable-model", "good.txt"),
    ("--student loop", "unusable-model", "loop"),
    ("--student headless", "damaged-model", "headless"),
    ("--student small_vocabulary", "tokenizer-mismatch", "small_vocabulary", "500"),
    ("--student short", "rows-too-long", "short", "32"),
    ("--teacher albert", "unsupported-model", "albert", '"albert"'),
    ("--student pickled_weights", "pickled-weights"),
    ("--student nan_weights", "damaged-model", "nan_weights"),
    ("--student cut_weights", "unusable-model", "cut_weights"),
    ("--student no_config", "unusable-model", "no_config"),
    ("--student config_not_json", "unusable-model", "config_not_json"),
    ("--student other_tokenizer", "tokenizer-mismatch", "other_tokenizer"),
    *(
        (f"--{role} other_vocabulary", "tokenizer-mismatch", f"{role} other_vocabulary")
        for role in ("teacher", "student", "baseline")
    ),
    ("--teacher config_untied", "damaged-model", "config_untied", "cls.predictions.decoder.bias"),
    ("--teacher decoder", "unsupported-model", "decoder", "is_decoder"),
    (
        "--baseline head_dropout --task tasks/good",
        "unusable-model",
        "head_dropout",
    ),
    ("--student no_vocabulary", "unusable-tokenizer", "no_vocabulary"),
    ("--data_dir nowhere", "not-a-corpus", "nowhere"),
    ("--data_dir void", "not-a-corpus", "void"),
    ("--data_dir good.txt", "not-a-corpus", "good.txt"),
    ("--data_dir corpus_cut", "damaged-corpus", "corpus_cut", "train/data.arrow", "1000"),
    ("--data_dir corpus_no_manifest", "damaged-corpus", "corpus_no_manifest", "manifest.json"),
    ("--data_dir corpus_without_counts", "damaged-corpus", "token_counts.npy"),
    ("--task nowhere", "bad-task", "nowhere/train.jsonl"),
    ("--task loop", "bad-task", "loop/train.jsonl"),
    ("--task good.txt", "bad-task", "good.txt/train.jsonl"),
    ("--task tasks/no_dev", "bad-task", "tasks/no_dev/dev.jsonl"),
    ("--task tasks/no_label", "bad-task", "tasks/no_label/train.jsonl", "line 1", '"label"'),
    ("--task tasks/label_list", "bad-task", "tasks/label_list/train.jsonl", "line 1", '"label"'),
    ("--task tasks/label_empty", "bad-task", "tasks/label_empty/train.jsonl", "line 1", '"label"'),
    ("--task tasks/score_in_dev", "bad-task", "score_in_dev/dev.jsonl", "line 1", "0.5"),
    ("--task tasks/score_and_class", "bad-task", "score_and_class/train.jsonl", "line 9", '"label"'),
    ("--task tasks/label_nan", "bad-task", "label_nan/train.jsonl", "line 1"),
    ("--task tasks/label_score", "bad-task", "label_score/train.jsonl", "line 1", '"3.5"'),
    ("--task tasks/label_exponent", "bad-task", "line 1", '"-1e-3"'),
    ("--task tasks/unlabelled", "bad-task", "tasks/unlabelled/train.jsonl"),
    ("--task tasks/unlabelled_dev", "bad-task", "tasks/unlabelled_dev/dev.jsonl", '"-"'),
    ("--task tasks/minus_one", "bad-task", "tasks/minus_one/train.jsonl"),
    ("--task tasks/kinds", "bad-task", "tasks/kinds", '"1"'),
    ("--task tasks/kinds_in_dev", "bad-task", "tasks/kinds_in_dev", '"1"'),
    ("--task tasks/booleans", "bad-task", "tasks/booleans"),
    ("--task tasks/text_number", "bad-task", "tasks/text_number/train.jsonl", "line 1", '"text"'),
    ("--task tasks/one_class", "bad-task", "tasks/one_class"),
    ("--task tasks/new_class", "bad-task", "dev.jsonl", "tasks/new_class", "train.jsonl"),
    ("--task tasks/mixed", "bad-task", "tasks/mixed"),
    ("--task tasks/empty_dev", "bad-task", "tasks/empty_dev/dev.jsonl"),
    ("--task tasks/not_json", "bad-task", "tasks/not_json/dev.jsonl", "line 1"),
    ("--task tasks/deep", "bad-task", "tasks/deep/dev.jsonl", "line 1"),
    ("--task tasks/array", "bad-task", "tasks/array/dev.jsonl", "line 1"),
    ("--task tasks/half_pair", "bad-task", "tasks/half_pair/dev.jsonl", "line 1", '"text"'),
    ("--task tasks/latin1", "bad-task", "tasks/latin1/dev.jsonl"),
    ("--task tasks/good --task more/good", "conflicting-arguments", "--task"),
    ("--max_rows 0", "bad-argument", "--max_rows"),
    ("--max_rows many", "bad-argument", "--max_rows", "many"),
    ("--task_epochs 0", "bad-argument", "--task_epochs"),
    ("--task_seeds -1", "bad-argument", "--task_seeds"),
    ("--task_batch_size 0", "bad-argument", "--task_batch_size"),
    ("--task_precision fp16", "unsupported-precision", "fp16"),
    ("--task_precision half", "bad-argument", "--task_precision"),
    ("--task_learning_rates nan", "bad-argument", "--task_learning_rates"),
    ("--task_learning_rates 2e-5,0", "bad-argument", "--task_learning_rates"),
    ("--seed -1", "bad-argument", "--seed"),
    ("--seed 4294967296", "bad-argument", "--seed"),
    ("--device tpu", "bad-argument", "--device", "tpu"),
    ("--output_dir occupied", "output-exists", "occupied"),
    ("--output_dir good.txt", "output-exists", "good.txt"),
    ("--output_dir corpus", "output-exists", "corpus"),
    ("--output_dir loop", "output-exists", "loop"),
    ("--output_dir link_to_void", "output-exists", "link_to_void"),
    ("--output_dir good.txt/evaluation", "unwritable-output", "good.txt/evaluation"),
]
PROFILE = "--tokens 32 --vocab_size 100 --hidden_size 16 --device cpu"
PROFILE_OPTIONS = [
    ("--tokens 0", "bad-argument", "--tokens"),
    ("--tokens -4", "bad-argument", "--tokens"),
    ("--tokens 1e3", "bad-argument", "--tokens", "1e3"),
    ("--tokens 1000000000", "bad-argument", "--tokens"),
    ("--vocab_size 0", "bad-argument", "--vocab_size"),
    ("--hidden_size 0", "bad-argument", "--hidden_size"),
    ("--repeats 0", "bad-argument", "--repeats"),
    ("--temperature 0", "bad-argument", "--temperature"),
    ("--temperature nan", "bad-argument", "--temperature"),
    ("--temperature inf", "bad-argument", "--temperature"),
    ("--dtype fp8", "bad-argument", "--dtype", "fp8"),
    ("--device tpu", "bad-argument", "--device", "tpu"),
    ("--peers apex", "bad-argument", "--peers"),
    ("--peers ''", "bad-argument", "--peers"),
    ("--output_dir occupied", "output-exists", "occupied"),
    ("--output_dir loop", "output-exists", "loop"),
    ("--output_dir good.txt/profile", "unwritable-output", "good.txt/profile"),
    ("--trace", "missing-argument", "--trace", "--output_dir"),
    ("--tune", "conflicting-arguments", "--tune", "--vocab_size"),
]
BENCHMARK = (
    "--deepspeed_config good_config.json --teacher teacher --data_dir corpus "
    "--train_batch_size 16 --per_device_train_batch_size 8"
)
BENCHMARK_OPTIONS = [
    ("--teacher none", "missing-argument", "--teacher"),
    ("--teacher nowhere", "unusable-model", "nowhere"),
    ("--data_dir void", "not-a-corpus", "void"),
    ("--deepspeed_config nowhere.json", "unreadable-config", "nowhere.json"),
    ("--deepspeed_config not_json.json", "unreadable-config", "not_json.json"),
    ("--deepspeed_config fp16_and_bf16.json", "conflicting-config", '"fp16"', '"bf16"'),
    ("--train_batch_size 17", "indivisible-batch", "train_batch_size", "17", "micro-batch"),
    ("--train_batch_size 0", "bad-argument", "--train_batch_size"),
    ("--rounds 0", "bad-argument", "--rounds"),
    ("--rounds few", "bad-argument", "--rounds", "few"),
    ("--ranks 0", "bad-argument", "--ranks"),
    ("--ranks 1,3", "indivisible-batch", "train_batch_size", "16", "micro-batch"),
    ("--ranks two", "bad-argument", "--ranks", "two"),
    ("--output result.json", "output-exists", "result.json"),
    ("--output occupied", "output-exists", "occupied"),
    ("--output loop", "output-exists", "loop"),
    ("--output nowhere/result.json", "unwritable-output", "nowhere/result.json"),
    ("--output good.txt/result.json", "unwritable-output", "good.txt/result.json"),
    (f"--output {LONG_NAME}", "unwritable-output"),
    ("--check nowhere.json", "unreadable-file", "nowhere.json"),
    ("--check result.json", "unreadable-file", "result.json"),
    ("--check not_json.json", "unreadable-file", "not_json.json"),
    ("--contestant theirs", "bad-argument", "--contestant", "theirs"),
]
BENCHMARK_PREPARATION = [
    ("--text nowhere.txt", "missing-file", "nowhere.txt"),
    ("--text occupied", "missing-file", "occupied"),
    ("--text empty.txt", "no-text", "empty.txt"),
    ("--text blank.txt", "no-text", "blank.txt"),
    ("--text latin1.txt", "not-utf8", "latin1.txt", "byte 4"),
    ("--tokenizer nowhere", "unusable-tokenizer", "nowhere"),
    ("--tokenizer no_mask", "unusable-tokenizer", "no_mask"),
    ("--seq_length 15", "bad-argument", "--seq_length", "15", "16"),
    ("--num_proc 0", "bad-argument", "--num_proc"),
    ("--rounds 0", "bad-argument", "--rounds"),
    ("--output result.json", "output-exists", "result.json"),
    ("--output nowhere/result.json", "unwritable-output", "nowhere/result.json"),
]
QUICKSTART_DATA = [
    ("--output_dir occupied", "output-exists", "occupied"),
    ("--output_dir good.txt", "output-exists", "good.txt"),
    ("--output_dir loop", "output-exists", "loop"),
    ("--output_dir good.txt/data", "unwritable-output", "good.txt/data"),
    ("--output_dir out/data --seq_length 15", "bad-argument", "--seq_length", "16"),
]
GPU_CHECK = [
    ("--output_dir occupied", "output-exists", "occupied"),
    ("--output_dir loop", "output-exists", "loop"),
    ("--output_dir good.txt/check", "unwritable-output", "good.txt/check"),
    ("--teacher teacher", "missing-argument", "--teacher", "--text"),
    ("--teacher nowhere --text good.txt", "missing-file", "nowhere", "--teacher"),
    ("--text good.txt", "missing-argument", "--teacher", "--text"),
    ("--teacher teacher --text nowhere.txt", "missing-file", "nowhere.txt", "--text"),
    ("--task nowhere", "missing-file", "nowhere", "--task"),
    ("--minutes 0", "bad-argument", "--minutes"),
    ("--minutes nan", "bad-argument", "--minutes"),
    ("--parts speed", "bad-argument", "--parts", "speed"),
]
CUT_VOCABULARY = [
    ("--model nowhere --text good.txt --vocab_size 100", "unusable-model", "nowhere"),
    ("--model teacher --text good.txt --vocab_size 0", "bad-argument", "--vocab_size"),
    ("--model teacher --text nowhere.txt --vocab_size 100", "unreadable-file", "nowhere.txt"),
    ("--model teacher --text good.txt --vocab_size 5", "bad-argument", "--vocab_size"),
]
TASK_FROM_TEXT = [
    ("--text nowhere.txt", "missing-file", "nowhere.txt"),
    ("--text good.txt", "no-text", "--train_examples"),
    ("--text good.txt --dev_examples 0", "bad-argument", "--dev_examples"),
]
NOTHING_GIVEN = [
    ("prepare_data.py", "", "missing-argument", "--output_dir"),
    ("prepare_data.py", "--tokenizer tokenizer --output_dir out", "missing-argument", "--text", "--dataset"),
    ("prepare_data.py", "--text good.txt --output_dir out", "missing-argument", "--tokenizer"),
    ("evaluate.py", "", "missing-argument", "--teacher", "--student", "--data_dir", "--output_dir"),
    ("benchmark.py", "", "missing-argument", "--deepspeed_config", "--teacher", "--data_dir"),
    ("benchmark_preparation.py", "", "missing-argument", "--text", "--tokenizer"),
    ("quickstart_data.py", "", "missing-argument", "--output_dir"),
    (
        "quickstart/cut_vocabulary.py",
        "",
        "missing-argument",
        "--model",
        "--text",
        "--vocab_size",
        "--output_dir",
    ),
    ("benchmarks/task_from_text.py", "", "missing-argument", "--kind", "--text", "--output_dir"),
    ("gpu_check.py", "", "missing-argument", "--output_dir"),
]
CASES = [
    *NOTHING_GIVEN,
    *(
        (command, f"{options} {arguments}", code, *named)
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
            ("quickstart/cut_vocabulary.py", "--output_dir out", CUT_VOCABULARY),
            ("benchmarks/task_from_text.py", "--kind punctuation --output_dir out", TASK_FROM_TEXT),
            ("gpu_check.py", "--smoke --output_dir out", GPU_CHECK),
        )
        for arguments, code, *named in table
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
    """Run in the folder, without network; restore the signal handlers."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # These fail when called: bad input must be refused before anything is measured.
    monkeypatch.setattr("distilspeed.trainer.evaluation.comparison._measure_models", None)
    monkeypatch.setattr("distilspeed.trainer.throughput.measurement.compare", None)
    monkeypatch.setattr("distilspeed.kernels.profiling.profile.profile_kernels", None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case[:2]))
def test_a_command_refuses(
    case: tuple[str, ...],
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command, arguments, code, *named = case
    line = refusal(command, [*shlex.split(arguments)], inputs, monkeypatch, capfd)
    assert_names(line, code, *named)
    assert "; " in line or " must be " in line, "it does not say what to do"


# --- a build of prepare_data.py that was interrupted ----------------------------------------------------


@pytest.fixture
def interrupted(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a build of half/corpus that Ctrl-C ended after its first rows; removed after the test."""
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
    ("damage", "arguments", "code", "named"),
    [
        ("", "", "unfinished-build", "--resume"),
        ("", "--resume --seq_length 32", "changed-build", "seq_length 64"),
        ("", "--resume --text few.txt", "changed-build", "sources"),
        ("", "--resume --document_separator blank_line", "changed-build", "document_separator line"),
        (
            "",
            "--resume --tokenizer limitless_tokenizer --held_out_fraction 0.2",
            "changed-build",
            "held_out_fraction",
        ),
        ("progress.json: {", "--resume", "damaged-build", "progress.json"),
        ("progress.json: []", "--resume", "damaged-build", "progress.json"),
        ("progress.json: \xff", "--resume", "damaged-build", "progress.json"),
        ('progress.json: {"recipe": {}, "written": {}}', "--resume", "damaged-build", "progress.json"),
        ("train/data.arrow: ", "--resume", "damaged-build", "rows"),
        ("locked", "--resume", "locked", "half/corpus"),
    ],
)
def test_prepare_data_refuses_to_continue(
    damage: str,
    arguments: str,
    code: str,
    named: str,
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
    line = refusal("prepare_data.py", shlex.split(options), inputs, monkeypatch, capfd)
    assert_names(line, code, "half/corpus", named)
    os.close(lock)


# --- the shell scripts ----------------------------------------------------------------------------------

# In a checkout without .venv, so that a script that accepts the input by mistake installs nothing.
SCRIPTS = [
    ("quickstart.sh --nonsense", "unknown argument --nonsense;"),
    ("quickstart.sh $'two\\nlines'", "unknown argument two lines;"),
    ("quickstart.sh --output_dir", "--output_dir needs a value;"),
    ("quickstart.sh --teacher somebody/bert", "--teacher needs text;"),
    ("quickstart.sh --from_scratch --teacher somebody/bert --text a.txt", "omit one of them"),
    ("quickstart.sh --dataset somebody/text", "--dataset and --text need a --teacher;"),
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
    ("slurm.sbatch --plan", "this is not a Slurm job;"),
    ("SLURM_JOB_ID=7 slurm.sbatch --plan", "this is not a Slurm job;"),
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


@pytest.mark.parametrize(("command", "shown"), SCRIPTS)
def test_a_script_refuses(command: str, shown: str, inputs: Path) -> None:
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
    assert shown in lines[0]
    assert lines[0].startswith("error: ")
    assert snapshot(inputs) == before
