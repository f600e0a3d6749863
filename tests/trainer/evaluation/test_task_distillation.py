"""The loss between the outputs of a student and a fine-tuned teacher, for every kind of head."""

import pytest
import torch
from torch.nn import functional
from transformers.utils import ModelOutput

from distilspeed.trainer.evaluation.task_distillation import soft_loss

T = 2.0


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def kl(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return T² KL(teacher || student) of one pair of distributions, by its definition."""
    p, q = (functional.softmax(logits.double() / T, dim=-1) for logits in (theirs, ours))
    return T**2 * (p * (p / q).log()).sum()


def test_classes_are_averaged_over_examples() -> None:
    ours, theirs = draws(3, 4), 2 * draws(3, 4).flip(0)
    expected = torch.stack([kl(*pair) for pair in zip(ours, theirs, strict=True)]).mean()
    found = soft_loss(ModelOutput(logits=ours), ModelOutput(logits=theirs), {}, T)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_score_is_compared_by_its_square() -> None:
    ours, theirs = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert soft_loss(ModelOutput(logits=ours), ModelOutput(logits=theirs), {}, T) == pytest.approx(4.5)


def test_tags_are_averaged_over_labelled_tokens() -> None:
    ours, theirs = draws(2, 3, 4), 2 * draws(2, 3, 4).flip(0)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 0]])
    places = [(0, 0), (0, 2), (1, 2)]
    expected = torch.stack([kl(ours[place], theirs[place]) for place in places]).mean()
    found = soft_loss(ModelOutput(logits=ours), ModelOutput(logits=theirs), {"labels": labels}, T)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_places_of_an_answer_exclude_padding() -> None:
    ours, theirs = (
        {name: draws(2, 5) + i for i, name in enumerate(("start_logits", "end_logits"))} for _ in "ab"
    )
    theirs = {name: 3 * logits.flip(0) for name, logits in theirs.items()}
    ours["start_logits"][1, 4] = 1e3  # padding, and so of no effect
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    expected = torch.stack(
        [kl(ours[name][row, :end], theirs[name][row, :end]) for name in ours for row, end in ((0, 5), (1, 3))]
    ).mean()
    found = soft_loss(ModelOutput(**ours), ModelOutput(**theirs), batch, T)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_it_is_zero_between_equal_outputs() -> None:
    logits = draws(3, 4)
    assert soft_loss(ModelOutput(logits=logits), ModelOutput(logits=logits), {}, T).item() == pytest.approx(0)
