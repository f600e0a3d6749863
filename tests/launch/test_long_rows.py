"""Rows of 1,024 and 8,192 tokens: longer documents are cut, and a step equals that of plain PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launcher import train_all, training_options, write_config
from plain_steps import plain_steps
from transformers import AutoModelForMaskedLM, AutoTokenizer, ModernBertConfig

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.format import open_corpus, read_rows
from distilspeed.trainer.models.loading import load_teacher, select_teacher_layers
from distilspeed.trainer.training.metrics import read_metrics

ROWS, LEARNING_RATE = 2, 0.02
SGD = {
    "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


@pytest.mark.parametrize("length", [1024, pytest.param(8192, marks=pytest.mark.full)])
def test_a_step_on_long_rows_equals_that_of_plain_pytorch(
    tmp_path: Path, family_dirs: Callable[[str], Any], reference_text: Path, length: int
) -> None:
    short, teacher_dir, corpus_dir = (
        family_dirs("modernbert").teacher,
        tmp_path / "teacher",
        tmp_path / "corpus",
    )
    tokenizer = AutoTokenizer.from_pretrained(short)
    tokenizer.save_pretrained(teacher_dir)
    config = ModernBertConfig.from_pretrained(short, max_position_embeddings=length)
    AutoModelForMaskedLM.from_pretrained(short, config=config).save_pretrained(teacher_dir)

    # Every other document is a paragraph; the others are longer than a row.
    paragraphs = reference_text.read_text(encoding="utf-8").splitlines()
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"{' '.join(paragraphs[i : i + 200])}\n{paragraphs[i]}" for i in range(0, 2000, 200))
    )
    prepare_corpus(
        CorpusArguments(
            text=(text,), tokenizer=str(teacher_dir), seq_length=length, output_dir=corpus_dir, num_proc=1
        )
    )
    corpus = open_corpus(corpus_dir)
    rows = read_rows(corpus.train, np.arange(len(corpus.train)))
    lengths = np.concatenate(rows.document_lengths)
    assert lengths.max() == length, "no document is cut"
    assert lengths.min() < length // 2
    for ids, of_row in zip(rows.input_ids, rows.document_lengths, strict=True):
        ends = np.cumsum(of_row)
        assert (ids[ends - of_row] == tokenizer.cls_token_id).all()
        assert (ids[ends - 1] == tokenizer.sep_token_id).all()

    arguments = training_options(
        teacher_dir,
        corpus_dir,
        tmp_path / "run",
        deepspeed_config=write_config(tmp_path / "sgd.json", SGD, remove=("scheduler",)),
        max_steps=1,
        train_batch_size=ROWS,
        per_device_train_batch_size=1,
    )
    train_all(tmp_path, [arguments], ranks=1)
    (step,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    layers = select_teacher_layers(load_teacher(str(teacher_dir)).config, None)
    _, (norm,) = plain_steps(teacher_dir, corpus_dir, layers, ROWS, [LEARNING_RATE])
    assert step.grad_norm == pytest.approx(norm, rel=1e-4)
