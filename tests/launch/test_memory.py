"""--plan's estimate of memory agrees with the measured peak, and a plan that exceeds the card's memory is refused."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import ROOT, error_lines, flags, ranks_alone, write_config
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)
from user_errors import assert_names

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.families.registry import family_of
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.plan import plan_memory
from distilspeed.trainer.training.run import prepare_run

MIB = 2**20


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path) -> Path:
    """A teacher with dropout, large enough that weights, activations and logits all matter."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher_dir)
    config = BertConfig(
        vocab_size=max(4000, len(tokenizer)),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=768,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory: pytest.TempPathFactory, small_tokenizer_dir: Path) -> Path:
    """A ModernBERT of such a size, without dropout."""
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir, model_max_length=2048)
    config = ModernBertConfig(
        vocab_size=2000,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("modernbert")
    ModernBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stage", "precision", "micro", "accumulation"),
    [
        (1, "bf16", 8, 4),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [
                (0, "fp32", 32, 2),
                (1, "fp32", 64, 1),
                (1, "bf16", 16, 1),
                (2, "bf16", 8, 2),
                (3, "fp32", 16, 2),
                (3, "bf16", 8, 2),
            ]
        ),
    ],
)
def test_the_estimate_is_within_8_percent_of_the_measured_peak(
    tmp_path: Path,
    teacher: Path,
    small_corpus_dir: Path,
    stage: int,
    precision: str,
    micro: int,
    accumulation: int,
) -> None:
    estimate, peak = estimated_and_measured(
        tmp_path, teacher, small_corpus_dir, stage, precision, micro, accumulation
    )
    assert estimate == pytest.approx(peak, rel=0.08)


@pytest.mark.full
@pytest.mark.parametrize(
    ("seq_length", "precision", "micro", "accumulation"),
    [(512, "fp32", 8, 1), (512, "bf16", 4, 2), (2048, "bf16", 2, 2)],
)
def test_so_it_is_with_rotary_positions_gates_and_long_rows_without_dropout(
    tmp_path: Path,
    modernbert: Path,
    reference_text: Path,
    seq_length: int,
    precision: str,
    micro: int,
    accumulation: int,
) -> None:
    corpus = tmp_path / "corpus"
    prepare_corpus(
        CorpusArguments(
            text=(reference_text,),
            tokenizer=str(modernbert),
            seq_length=seq_length,
            output_dir=corpus,
            num_proc=1,
        )
    )
    estimate, peak = estimated_and_measured(tmp_path, modernbert, corpus, 1, precision, micro, accumulation)
    assert estimate == pytest.approx(peak, rel=0.08)


# Larger sizes of a tiny teacher, and the tolerance. In XLM-RoBERTa embeddings and logits take most of the memory.
LARGER: dict[str, tuple[dict[str, float], float]] = {
    "xlm-roberta": (
        {
            "vocab_size": 40_000,
            "hidden_size": 128,
            "intermediate_size": 512,
            "attention_probs_dropout_prob": 0.1,
        },
        0.08,
    ),
    "gpt2": (
        {
            "vocab_size": 4000,
            "n_embd": 192,
            "n_inner": 768,
            "attn_pdrop": 0.1,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
        },
        0.15,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize(("precision", "micro", "accumulation"), [("fp32", 16, 1), ("bf16", 8, 2)])
@pytest.mark.parametrize("name", LARGER)
def test_so_it_is_with_a_vocabulary_that_dominates_and_for_a_causal_model(
    tmp_path: Path,
    family_dirs: Callable[[str], Any],
    name: str,
    precision: str,
    micro: int,
    accumulation: int,
) -> None:
    folders, (sizes, tolerance) = family_dirs(name), LARGER[name]
    config = AutoConfig.from_pretrained(folders.teacher, **sizes)
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    family_of(config).model_class.from_config(config).save_pretrained(teacher)
    AutoTokenizer.from_pretrained(folders.teacher).save_pretrained(teacher)
    estimate, peak = estimated_and_measured(
        tmp_path, teacher, folders.corpus, 1, precision, micro, accumulation
    )
    assert estimate == pytest.approx(peak, rel=tolerance)


def estimated_and_measured(
    folder: Path, teacher: Path, corpus: Path, stage: int, precision: str, micro: int, accumulation: int
) -> tuple[float, float]:
    """Return the plan's MiB of tensors, and the peak of the trainer's steps."""
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
    changes = {"zero_optimization": zero, "bf16": {"enabled": precision == "bf16"}}
    config = write_config(folder / "config.json", changes)
    options = {
        "deepspeed_config": config,
        "teacher": str(teacher),
        "data_dir": corpus,
        "output_dir": folder / "none",
        "max_steps": 10,
        "train_batch_size": micro * accumulation,
        "per_device_train_batch_size": micro,
    }
    result = ranks_alone(Path(__file__).with_name("memory_job.py"), *flags(options), ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    peak = int(result.stdout.rpartition("peak ")[2])

    run = prepare_run(TrainArguments(**options))
    return plan_memory(run, run.batch).total / MIB, peak / MIB


def test_a_plan_over_the_cards_memory_is_refused_with_the_micro_batch_that_fits(
    tmp_path: Path, tiny_teacher_dir: Path, small_corpus_dir: Path
) -> None:
    def plan(gib: float) -> subprocess.CompletedProcess[str]:
        return ranks_alone(
            ROOT / "launch" / "train.py",
            *("--plan", "--gpu_memory", gib, "--deepspeed_config", ROOT / "ds_configs" / "cpu.json"),
            *(
                "--teacher",
                tiny_teacher_dir,
                "--data_dir",
                small_corpus_dir,
                "--output_dir",
                tmp_path / "run",
            ),
            *("--train_batch_size", 4096, "--per_device_train_batch_size", 4096),
            ranks=1,
        )

    refused = plan(2.0)
    assert refused.returncode == 2
    (line,) = error_lines(refused)
    assert_names(line, "out-of-memory", "train_micro_batch_size_per_gpu")
    what_to_do = line.partition("; ")[2]
    (fitting,) = map(int, re.findall(r"\d+", what_to_do))
    assert fitting < 4096
    assert 4096 % fitting == 0
    assert plan(16.0).returncode == 0
    assert not (tmp_path / "run").exists()
