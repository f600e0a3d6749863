"""``launch/evaluate.py`` with a user's own task, a regression: a class and an entry in the registry."""

import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from distilspeed.trainer.evaluation.tasks.registry import TASKS
from distilspeed.trainer.evaluation.tasks.sentences import Example, encode
from distilspeed.trainer.evaluation.tasks.task import Feature, FineTuning, Predictions, Scores, Task
from distilspeed.trainer.models.loading import Head


@dataclass(frozen=True)
class Similarity(Task):
    """The similarity of two sentences: a folder with train.tsv and dev.tsv, lines of a number and two sentences."""

    metrics = ("pearson", "within_one")
    fine_tuning = FineTuning(epochs=2, learning_rate=3e-5, batch_size=16, max_length=64)
    head = Head(AutoModelForSequenceClassification, num_labels=1, problem_type="regression")

    @classmethod
    def is_named(cls, name: str) -> bool:
        return (Path(name) / "train.tsv").exists()

    @classmethod
    def read(cls, name: str) -> "Similarity":
        folder = Path(name)
        return cls(folder.resolve().name, read_pairs(folder / "train.tsv"), read_pairs(folder / "dev.tsv"))

    def features(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Feature]:
        return encode(examples, tokenizer, max_length)

    def score(self, features: Sequence[Feature], predictions: Predictions) -> Scores:
        found = torch.cat(predictions["logits"])
        wanted = torch.tensor([feature["labels"] for feature in features])
        pearson = torch.corrcoef(torch.stack([found, wanted]))[0, 1].nan_to_num()
        within_one = ((found - wanted).abs() <= 1).float().mean()
        return {"pearson": pearson.item(), "within_one": within_one.item()}


def read_pairs(path: Path) -> list[Example]:
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [Example(first, second, float(number)) for number, first, second in lines]


if __name__ == "__main__":
    TASKS.append(Similarity)
    runpy.run_path(str(Path(__file__).parents[2] / "launch" / "evaluate.py"), run_name="__main__")
