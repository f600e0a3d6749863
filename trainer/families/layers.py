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


def half_in_order_of_types(types: Sequence[str]) -> tuple[int, ...]:
    """Return half of a teacher's layers, with the types of its first half: every third global, if the teacher's are.

    Among these choices it is the one closest to an even spread over all layers, by the sum of squared distances; it
    includes layer 0.
    """
    kept = max(1, len(types) // 2)
    # the last chosen layer -> squared distance and layers of the best choice so far
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, (0,))}
    for place in range(1, kept):
        best = {
            layer: min(
                # Both sides times kept - 1, so that the distances are integers.
                (distance + (layer * (kept - 1) - place * (len(types) - 1)) ** 2, (*chosen, layer))
                for last, (distance, chosen) in best.items()
                if last < layer
            )
            for layer in range(place, len(types))
            if types[layer] == types[place] and layer > min(best)
        }
    return min(best.values())[1]


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
