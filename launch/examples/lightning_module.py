"""Distil with Lightning; teacher and student share a tokenizer. Needs ``pip install lightning``."""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, AutoTokenizer, BatchEncoding, DataCollatorForLanguageModeling

from distilspeed.kernels.distillation_loss import distillation_loss


class DistillationModule(lightning.LightningModule):
    """The loss is the mean over a batch. accumulate_grad_batches averages these means, so a step depends on the split.

    To avoid that, use manual optimisation and the normalizers of plain_pytorch.py.
    """

    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module) -> None:
        super().__init__()
        self.student = student.train()  # from_pretrained returns evaluation mode, which Lightning keeps
        self.teacher = teacher.requires_grad_(False)

    def training_step(self, batch: BatchEncoding, batch_index: int) -> torch.Tensor:
        ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
        with torch.no_grad():
            teacher_logits = self.teacher(ids, attention_mask=mask).logits
        student_logits = self.student(ids, attention_mask=mask).logits
        losses = distillation_loss(student_logits, teacher_logits, labels, soft_mask=mask)
        loss = 5 * losses.kl + 2 * losses.hard_ce
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=5e-4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--teacher", "--student", "--text", "--output_dir"):
        parser.add_argument(name, required=True)
    for name, default in {"--max_steps": 100, "--batch_size": 8}.items():
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    teacher = AutoModelForMaskedLM.from_pretrained(args.teacher, dtype=torch.float32)
    student = AutoModelForMaskedLM.from_pretrained(args.student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    lines = [line for line in Path(args.text).read_text(encoding="utf-8").splitlines() if line.strip()]
    most = min(tokenizer.model_max_length, student.config.max_position_embeddings)  # RoBERTa: 512 of 514
    rows: Any = [{"input_ids": ids} for ids in tokenizer(lines, truncation=True, max_length=most).input_ids]
    collator = DataCollatorForLanguageModeling(tokenizer)
    loader = DataLoader(rows, args.batch_size, shuffle=True, collate_fn=collator)
    trainer = lightning.Trainer(max_steps=args.max_steps, logger=False, enable_checkpointing=False)
    trainer.fit(DistillationModule(student, teacher), loader)
    if trainer.is_global_zero:
        student.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
