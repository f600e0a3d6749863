"""The two kinds of language modelling, by which corpus, models and losses must agree."""

from typing import Literal

# masked: predict tokens that were masked, from both sides; causal: predict each next token, from the tokens before it.
TrainingObjective = Literal["masked", "causal"]
