"""Distil logits and hidden states in a plain PyTorch loop; teacher and student share tokenizer and hidden size."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoModelForMaskedLM, AutoTokenizer, BatchEncoding, DataCollatorForLanguageModeling

from distilspeed.kernels.cosine_loss import cosine_loss
from distilspeed.kernels.distillation_loss import distillation_loss


def accumulate_gradient(student: nn.Module, teacher: nn.Module, micro_batches: list[BatchEncoding]) -> Tensor:
    """Backpropagate the loss averaged over all micro-batches' tokens, independent of their split; return the loss."""
    # Counts of the whole batch: in a mean of micro-batch means, tokens of shorter micro-batches weigh more.
    tokens = torch.stack([batch["attention_mask"].sum() for batch in micro_batches]).sum()
    labelled = torch.stack([(batch["labels"] != -100).sum() for batch in micro_batches]).sum().clamp(min=1)
    counts: dict[str, Any] = {"soft_normalizer": tokens, "hard_normalizer": labelled}
    total = torch.zeros((), device=tokens.device)
    for batch in micro_batches:
        ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
        with torch.no_grad():
            target = teacher(ids, attention_mask=mask, output_hidden_states=True)
        output = student(ids, attention_mask=mask, output_hidden_states=True)
        losses = distillation_loss(output.logits, target.logits, labels, soft_mask=mask, **counts)
        last_layers = output.hidden_states[-1], target.hidden_states[-1]
        loss = 5 * losses.kl + 2 * losses.hard_ce + cosine_loss(*last_layers, mask=mask, normalizer=tokens)
        loss.backward()
        total += loss.detach()
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--teacher", "--student", "--text", "--output_dir"):
        parser.add_argument(name, required=True)
    for name, default in {"--max_steps": 100, "--batch_size": 8, "--accumulation_steps": 1}.items():
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModelForMaskedLM.from_pretrained(args.teacher, dtype=torch.float32).to(device)
    student = AutoModelForMaskedLM.from_pretrained(args.student, dtype=torch.float32).to(device).train()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    lines = [line for line in Path(args.text).read_text(encoding="utf-8").splitlines() if line.strip()]
    most = min(tokenizer.model_max_length, student.config.max_position_embeddings)  # RoBERTa: 512 of 514
    rows: Any = [{"input_ids": ids} for ids in tokenizer(lines, truncation=True, max_length=most).input_ids]
    sampler = RandomSampler(rows, num_samples=args.max_steps * args.accumulation_steps * args.batch_size)
    collator = DataCollatorForLanguageModeling(tokenizer)
    micro_batches = iter(DataLoader(rows, args.batch_size, sampler=sampler, collate_fn=collator))
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4)
    for step in range(args.max_steps):
        batch = [next(micro_batches).to(device) for _ in range(args.accumulation_steps)]
        print(f"step {step}: loss {accumulate_gradient(student, teacher, batch):.4f}")
        optimizer.step()
        optimizer.zero_grad()
    student.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
