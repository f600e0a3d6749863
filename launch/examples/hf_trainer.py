"""Distil with transformers' Trainer; teacher and student share a tokenizer. Needs ``pip install accelerate``."""

from pathlib import Path
from typing import Any

import torch
import transformers

from distilspeed.kernels.distillation_loss import distillation_loss


class DistillationTrainer(transformers.Trainer):
    """A Trainer whose step does not depend on how a batch is split over micro-batches and ranks."""

    def __init__(self, *args: Any, teacher: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        self.teacher = teacher.to(self.args.device, dtype)  # Trainer's autocast covers only the student
        self.model_accepts_loss_kwargs = True  # else Trainer also divides the loss by the accumulation steps

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Trainer counts labels, but not real tokens. Both are counted over all micro-batches: a mean of
        # micro-batch means would depend on the split. They are averaged over ranks, like the gradients.
        counts = torch.zeros(2, device=device)
        for batch in batches:
            counts += torch.stack((batch["attention_mask"].sum(), (batch["labels"] != -100).sum())).to(device)
        return batches, self.accelerator.reduce(counts, "mean").clamp(min=1 / self.args.world_size)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs["attention_mask"].bool()
        outputs = model(ids, attention_mask=mask)
        with torch.no_grad():
            teacher_logits = self.teacher(ids, attention_mask=mask).logits.to(outputs.logits.dtype)
        tokens, labelled = num_items_in_batch if model.training else (None, None)
        counts: dict[str, Any] = {"soft_normalizer": tokens, "hard_normalizer": labelled}
        losses = distillation_loss(outputs.logits, teacher_logits, labels, soft_mask=mask, **counts)
        loss = 5 * losses.kl + 2 * losses.hard_ce
        return (loss, outputs) if return_outputs else loss


if __name__ == "__main__":
    parser = transformers.HfArgumentParser(transformers.TrainingArguments, description=__doc__)  # type: ignore[arg-type]
    parser.set_defaults(max_steps=100, learning_rate=5e-4, save_strategy="no")
    for name in ("--teacher", "--student", "--text"):
        parser.add_argument(name, required=True)
    settings, args = parser.parse_args_into_dataclasses()
    teacher = transformers.AutoModelForMaskedLM.from_pretrained(args.teacher, dtype=torch.float32)
    student = transformers.AutoModelForMaskedLM.from_pretrained(args.student, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.teacher)
    lines = [line for line in Path(args.text).read_text(encoding="utf-8").splitlines() if line.strip()]
    longest = min(tokenizer.model_max_length, student.config.max_position_embeddings)  # RoBERTa: 512 of 514
    rows = [{"input_ids": ids} for ids in tokenizer(lines, truncation=True, max_length=longest).input_ids]
    masks = transformers.DataCollatorForLanguageModeling(tokenizer)
    trainer = DistillationTrainer(student, settings, masks, rows, processing_class=tokenizer, teacher=teacher)
    trainer.train()
    trainer.save_model()
    trainer.accelerator.end_training()  # destroys the process group if torchrun started several ranks
