"""The language model: an LSTM that reads the image as its first word and then predicts the caption word by word.

Shapes: N captions (each with the feature of its image), D longest caption, T = D + 2 steps, V words, E encoding,
H hidden, L layers, R rows of a running search, P targets of a batch.

Steps: t=0 feeds the image feature, t=1 the START token, t>=2 the words. What step t predicts is word t (1-based) of
the caption, and END after its last word; step 0 predicts nothing. Ids are 1-based: words 1..V, START = END = V+1 with
one embedding row, 0 is padding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.data.vocabulary import end_id_of
from captioner.kernels import PackedLinear, dropout, lstm_weights, run_lstm
from captioner.model.packed_captions import pack_captions
from captioner.model.search_step import log_softmax, lstm_cell, widen
from captioner.runtime.transfers import upload


@dataclass(frozen=True)
class LSTMState:
    """A running search: h and c, each (L, R, H), the latter float32 or wider."""

    h: Tensor
    c: Tensor

    @property
    def device(self) -> torch.device:
        return self.h.device

    def select(self, rows: Tensor, per_image: int | None = None) -> "LSTMState":
        """The state whose row i goes on from row rows[i] of this one; which image a row belongs to does not matter."""
        return LSTMState(self.h.index_select(1, rows), self.c.index_select(1, rows))


class Decoder(nn.Module):
    """LSTM language model over V words, conditioned on an image feature.

    Args:
        vocab_size: V, the number of words without START/END.
        encoding_size: E, width of the image feature and of the word embeddings.
        rnn_size: H, width of the LSTM.
        num_layers: L, LSTM layers on top of each other.
        drop_prob: dropout between the layers and before the output layer, in training mode only.
    """

    # Whatever has one row per word, and a last one for END (which is START in the embedding).
    rows_of_words: ClassVar = ("embedding.weight", "output.weight", "output.bias")

    def __init__(
        self, vocab_size: int, encoding_size: int, rnn_size: int, num_layers: int = 1, drop_prob: float = 0.5
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.end_id = end_id_of(vocab_size)
        self.drop_prob = drop_prob
        # from_pretrained, for the constructor would draw initial values only to have them drawn again below.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size + 1, encoding_size), freeze=False)
        # nn.LSTM would warn about dropout that one layer has no use for.
        self.lstm = nn.LSTM(encoding_size, rnn_size, num_layers, dropout=drop_prob if num_layers > 1 else 0.0)
        self.output = nn.Linear(rnn_size, vocab_size + 1)
        self.packed: list[tuple[PackedLinear, PackedLinear]] = []  # of each LSTM layer after `pack`: input and hidden
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Torch7 did: layers uniform in +-1/sqrt(fan_in), biases too; embeddings N(0, 1)."""
        if self.embedding.weight.is_meta:  # no values to set; torch would import its compiler to do nothing, 1 s
            return
        nn.init.normal_(self.embedding.weight)
        weight = self.output.weight
        for parameter in self.output.parameters():
            nn.init.uniform_(parameter, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        for layer in range(self.lstm.num_layers):
            for side in ("ih", "hh"):
                bound = getattr(self.lstm, f"weight_{side}_l{layer}").shape[1] ** -0.5
                for kind in ("weight", "bias"):
                    nn.init.uniform_(getattr(self.lstm, f"{kind}_{side}_l{layer}"), -bound, bound)

    def forward(self, encodings: Tensor, labels: Tensor, image_of_caption: Tensor | None = None) -> Tensor:
        """Log-probabilities of every next word, given the true words before it.

        Args:
            encodings: (I, E), one per image.
            labels: (N, D) int64 word ids, 0-padded. A 0 is fed as word 1, which matters to no loss.
            image_of_caption: (N,) int64; None: caption i describes image i.

        Returns:
            (N, D+2, V+1) log-probabilities; [:, t, k-1] is that of id k at step t.
        """
        images = encodings if image_of_caption is None else encodings[image_of_caption]
        tokens = labels.t().clamp(min=1)  # (D, N)
        start = tokens.new_full((1, len(labels)), self.end_id)
        words = self.embedding(torch.cat([start, tokens]) - 1)  # (D+1, N, E)
        hidden, _ = self.lstm(torch.cat([images.unsqueeze(0), words]))  # (D+2, N, H)
        return log_softmax(self.output(dropout(hidden, self.drop_prob, self.training))).transpose(0, 1)

    def output_of(
        self, encodings: Tensor, image_of_caption: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the loss is of: all that `kernels.output_loss` wants.

        Args:
            encodings: (N, E), one row per image.
            image_of_caption, labels: as of `CaptionModel.loss_sum`.

        Returns:
            (P, H) that enters the output layer, its weight (V+1, H) and bias (V+1,), and the targets' columns (P,).
        """
        device = encodings.device
        captions = pack_captions(labels.cpu(), self.end_id)  # on the CPU, so that a GPU never waits for it
        order, tokens = upload(captions.order, device), upload(captions.tokens, device)
        # By two steps: the gradients of an image's captions add up in the captions' order, as they always have.
        images = encodings[upload(image_of_caption, device)][order]
        inputs = torch.cat([images, self.embedding(tokens - 1)])
        hidden = run_lstm(self.lstm, inputs, [len(labels), *captions.counts])[len(labels) :]  # without the image step
        hidden, columns = captions.with_targets(hidden)
        hidden = dropout(hidden, self.drop_prob, self.training)
        return hidden, self.output.weight, self.output.bias, columns

    def pack(self) -> None:
        """Prepare for searches in bfloat16 on a CPU, as PackedLinear describes; only `start` and `step` work then."""
        layers = [lstm_weights(self.lstm, layer) for layer in range(self.lstm.num_layers)]
        self.packed = [(PackedLinear(w_ih, b_ih), PackedLinear(w_hh, b_hh)) for w_ih, w_hh, b_ih, b_hh in layers]
        self.output = PackedLinear(self.output.weight, self.output.bias)

    def start(self, features: Tensor) -> LSTMState:
        """State after the image step, for features (R, E); the next token to feed is START."""
        weight = self.output.weight
        h = weight.new_zeros(self.lstm.num_layers, len(features), self.lstm.hidden_size)
        return self._advance(features.to(weight.dtype), LSTMState(h, widen(h)))

    def step(self, tokens: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """Feed one token per row.

        Args:
            tokens: (R,) int64 ids in 1..V+1.
            state: from `start` or an earlier `step`.

        Returns:
            Log-probabilities (R, V+1), float32 or wider, of the next id, and the state after this one.
        """
        state = self._advance(self.embedding(tokens - 1), state)
        return log_softmax(self.output(dropout(state.h[-1], self.drop_prob, self.training))), state

    def _advance(self, inputs: Tensor, state: LSTMState) -> LSTMState:
        """One LSTM step for inputs (R, E), without dropout between layers.

        With half-precision weights the products are in half precision, but the cell, which sums over all steps,
        is float32.
        """
        h, c = [], []
        for layer in range(self.lstm.num_layers):
            if self.packed:
                from_input, from_hidden = self.packed[layer]
                gates = from_input(inputs) + from_hidden(state.h[layer])
            else:
                w_ih, w_hh, b_ih, b_hh = lstm_weights(self.lstm, layer)
                gates = F.linear(inputs, w_ih, b_ih) + F.linear(state.h[layer], w_hh, b_hh)
            inputs, cell = lstm_cell(gates, state.c[layer])
            h.append(inputs)
            c.append(cell)
        if len(h) == 1:  # as most models: nothing to copy
            return LSTMState(h[0].unsqueeze(0), c[0].unsqueeze(0))
        return LSTMState(torch.stack(h), torch.stack(c))
