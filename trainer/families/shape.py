"""The sizes of a model, and its FLOPs and parameters computed from them."""

from dataclasses import dataclass

FLOPS_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Transformer that determine its FLOPs and memory."""

    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    positions: int  # maximum row length
    heads: int
    is_gated: bool = False  # feed-forward layers have a third matrix, as wide as the first
    is_rotary: bool = False  # queries and keys are rotated by position; there are no position embeddings
    is_gelu_new: bool = False  # an activation of several operators, each of which keeps its input

    @property
    def parameters(self) -> int:
        """Number of weights in embeddings, layers and a tied head, without biases and norms (below 1 %)."""
        positions = 0 if self.is_rotary else self.positions
        embeddings = (self.vocab_size + positions) * self.hidden_size
        return embeddings + self.layers * self._layer_weights + self._head_weights

    @property
    def _head_weights(self) -> int:
        """The head's weights besides the vocabulary projection: an MLM head transforms the hidden states before it."""
        return self.hidden_size**2

    @property
    def _layer_weights(self) -> int:
        feed_forward = 3 if self.is_gated else 2
        return 4 * self.hidden_size**2 + feed_forward * self.hidden_size * self.intermediate_size

    def forward_flops_per_token(self, seq_length: int, head_share: float = 1.0) -> float:
        """Return the forward FLOPs per token of the matrix products alone.

        These are projections, attention over the whole row (also in layers with a window, whose mask does not save
        SDPA any work), feed-forward layers and head. ``head_share``: fraction of tokens that pass through the head.
        """
        attention = 2 * seq_length * self.hidden_size
        head = head_share * (self._head_weights + self.hidden_size * self.vocab_size)
        return FLOPS_PER_MULTIPLY_ADD * (self.layers * (self._layer_weights + attention) + head)
