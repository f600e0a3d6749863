"""The quality of a language model on held-out rows, and the words for it in reports and model cards."""

from dataclasses import dataclass
from typing import ClassVar

HubMetric = tuple[str, float, str]  # type, value and name, in the hub's metadata


@dataclass(frozen=True)
class MaskedTokenQuality:
    """Quality on masked tokens: mean of -log softmax(logits)[label] in nats, and accuracy from 0 to 1.

    ``loss`` and ``accuracy`` are those of uniformly drawn masks, as in the literature. The masks of training, as many,
    prefer rare tokens: they give a lower accuracy, and a loss that is comparable with ``loss_mlm`` of training.
    """

    loss: float
    accuracy: float
    masked_tokens: int
    training_masks_loss: float
    training_masks_accuracy: float

    short: ClassVar[str] = "MLM"
    task: ClassVar[str] = "Masked language modelling"
    hub_task: ClassVar[str] = "fill-mask"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    accuracy_name: ClassVar[str] = "masked accuracy"
    head: ClassVar[str] = "MLM head"
    columns: ClassVar[tuple[str, ...]] = ("masked loss", accuracy_name)
    further_columns: ClassVar[tuple[str, ...]] = ("masks of training: accuracy / loss",)

    @staticmethod
    def labels(mlm_smoothing: float) -> tuple[str, str]:
        """Describe the labels of training, as a row of the model card."""
        chosen = f"with probability ∝ count^-{mlm_smoothing:g}" if mlm_smoothing else "uniformly"
        return "Masking", f"dynamic, 15 % of the tokens, drawn {chosen}"

    def cells(self) -> tuple[str, ...]:
        return f"{self.loss:.3f}", f"{100 * self.accuracy:.1f} %"

    def further_cells(self) -> tuple[str, ...]:
        return (f"{100 * self.training_masks_accuracy:.1f} % / {self.training_masks_loss:.3f}",)

    def conditions(self, seed: int) -> str:
        """Describe the tokens of a comparison of models."""
        return (
            f"15 % of the tokens masked, {self.masked_tokens:,}, drawn uniformly; 80 % become [MASK], 10 % a random "
            f"token, 10 % stay. The masks are the same for every model (seed {seed}). Loss in nats per masked token. "
            "Masks of training: as many tokens of the same rows, but rare ones preferred, probability ∝ count^-0.7; "
            "that loss is comparable with loss_mlm of training with the default --mlm_smoothing."
        )

    def described(self) -> str:
        return (
            f"masked accuracy {self.accuracy:.1%}, loss {self.loss:.4f} ({self.masked_tokens:,} tokens, drawn "
            f"uniformly); with masks that prefer rare tokens, ∝ count^-0.7: accuracy "
            f"{self.training_masks_accuracy:.1%}, MLM loss {self.training_masks_loss:.4f}"
        )

    def hub_metrics(self) -> tuple[HubMetric, ...]:
        return (
            ("accuracy", self.accuracy, "Accuracy on masked tokens, 15 % drawn uniformly"),
            ("loss", self.loss, "Cross-entropy of masked tokens in nats"),
        )


@dataclass(frozen=True)
class NextTokenQuality:
    """Quality on next tokens: mean of -log softmax(logits)[label] in nats, its exponential, accuracy from 0 to 1."""

    loss: float
    perplexity: float
    accuracy: float
    predicted_tokens: int

    short: ClassVar[str] = "CLM"
    task: ClassVar[str] = "Causal language modelling"
    hub_task: ClassVar[str] = "text-generation"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    accuracy_name: ClassVar[str] = "next-token accuracy"
    head: ClassVar[str] = "vocabulary projection"
    columns: ClassVar[tuple[str, ...]] = ("held-out perplexity", accuracy_name)
    further_columns: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def labels(mlm_smoothing: float) -> tuple[str, str]:
        """Describe the labels of training, as a row of the model card."""
        return "Labels", "the next token of the same document"

    def cells(self) -> tuple[str, ...]:
        return f"{self.perplexity:.2f}", f"{100 * self.accuracy:.1f} %"

    def further_cells(self) -> tuple[str, ...]:
        return ()

    def conditions(self, seed: int) -> str:
        """Describe the tokens of a comparison of models."""
        return (
            f"{self.predicted_tokens:,} tokens, each predicted from the tokens before it in its document. "
            "Perplexity: exponential of the mean loss per token."
        )

    def described(self) -> str:
        return (
            f"perplexity {self.perplexity:.2f}, CLM loss {self.loss:.4f}, accuracy {self.accuracy:.1%} "
            f"of {self.predicted_tokens:,} next tokens"
        )

    def hub_metrics(self) -> tuple[HubMetric, ...]:
        return (
            ("perplexity", self.perplexity, "Perplexity per token"),
            ("accuracy", self.accuracy, "Accuracy on next tokens"),
            ("loss", self.loss, "Cross-entropy of next tokens in nats"),
        )


TokenQuality = MaskedTokenQuality | NextTokenQuality
