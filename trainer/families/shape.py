"""The sizes of a model, and the FLOPs and parameters that follow from them."""

from dataclasses import dataclass

FLOPS_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Transformer that FLOPs and memory follow from."""

    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    positions: int  # the longest row that it takes
    heads: int

    @property
    def parameters(self) -> int:
        """Weights of embeddings, layers and a tied MLM head; biases and norms (below 1 %) left out."""
        embeddings = (self.vocab_size + self.positions) * self.hidden_size
        return embeddings + self.layers * self._layer_weights + self.hidden_size**2

    @property
    def _layer_weights(self) -> int:
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size

    def forward_flops_per_token(self, seq_length: int, head_share: float = 1.0) -> float:
        """Matrix products only: projections, attention over the whole row, feed-forward, MLM head.

        ``head_share``: of the tokens, those that the MLM head is computed for.
        """
        attention = 2 * seq_length * self.hidden_size
        head = head_share * (self.hidden_size**2 + self.hidden_size * self.vocab_size)
        return FLOPS_PER_MULTIPLY_ADD * (self.layers * (self._layer_weights + attention) + head)
