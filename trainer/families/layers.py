"""The teacher's layers that a student starts from."""

from collections.abc import Mapping, Sequence

import torch

# The layers of BERT-base that DistilBERT-base starts from (Sanh et al. 2019, original code).
DISTILBERT_LAYERS_OF_12 = (0, 2, 4, 7, 9, 11)


def half_of_layers(num_layers: int) -> tuple[int, ...]:
    """Return half of a teacher's layers, evenly spread and including the first and last; of one layer, that layer."""
    if num_layers == 12:
        return DISTILBERT_LAYERS_OF_12
    kept = max(1, num_layers // 2)
    return tuple(int(i * (num_layers - 1) / max(1, kept - 1) + 0.5) for i in range(kept))


def keep_layers(
    weights: Mapping[str, torch.Tensor], prefix: str, layers: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return a model's weights with only the given layers, numbered from 0.

    Args:
        prefix: what comes before the layer's number in the names of its weights, for example "roberta.encoder.layer.".
    """
    kept = {name: weight for name, weight in weights.items() if not name.startswith(prefix)}
    for name, weight in weights.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) in layers:
                kept[f"{prefix}{layers.index(int(number))}.{rest}"] = weight
    return kept
