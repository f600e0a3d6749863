"""The masks of packed rows, in the form of each attention implementation."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from distilspeed.trainer.families.masks import FLEX, VARLEN, Documents, causal_document_mask, document_mask

DOCUMENT_IDS = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [0, 1, 1, 1, 2, 2, 2]])
STARTS = torch.tensor([0, 3, 5, 7, 8, 11, 14, 14, 14], dtype=torch.int32)
DOCUMENTS = Documents(DOCUMENT_IDS, STARTS)


def sees(row: int, query: int, key: int, causal: bool) -> bool:
    same_document = bool(DOCUMENT_IDS[row, query] == DOCUMENT_IDS[row, key])
    return same_document and (key <= query or not causal)


@pytest.mark.parametrize("causal", [False, True])
def test_a_token_sees_its_own_document_alone_and_in_a_causal_mask_nothing_later(causal: bool) -> None:
    make = causal_document_mask if causal else document_mask
    rows, length = DOCUMENT_IDS.shape
    expected = torch.tensor(
        [
            [[[sees(row, query, key, causal) for key in range(length)] for query in range(length)]]
            for row in range(rows)
        ]
    )
    assert torch.equal(make(DOCUMENTS, "sdpa"), expected)
    assert expected.any(-1).all(), "a token that sees nothing gets NaN"
    flex = make(DOCUMENTS, FLEX)
    assert torch.equal(create_mask(flex.mask_mod, rows, 1, length, length, device="cpu"), expected)
    assert torch.equal(make(DOCUMENTS, VARLEN), STARTS[None, None, None])
