"""The language model: an LSTM that reads the image as its first word and then predicts the caption word by word.

Shapes: N captions (each with the feature of its image), D longest caption, T = D + 2 steps, V words, E encoding,
H hidden, L layers, R rows of a running search, P targets of a batch.

Steps: t=0 feeds the image feature, t=1 the START token, t>=2 the words. What step t predicts is word t (1-based) of
the caption, and END after its last word; step 0 predicts nothing. Ids are 1-based: words 1..V, START = END = V+1 with
one embedding row, 0 is padding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.kernels import PackedLinear, dropout, lstm_weights, output_loss, run_lstm

# h and c, each (L, R, H).
State = tuple[Tensor, Tensor]


class Decoder(nn.Module):
    """LSTM language model over V words, conditioned on an image feature.

    Args:
        vocab_size: V, the number of words without START/END.
        encoding_size: E, width of the image feature and of the word embeddings.
        rnn_size: H, width of the LSTM.
        num_layers: L, LSTM layers on top of each other.
        drop_prob: dropout between the layers and before the output layer, in training mode only.
    """

    def __init__(
        self, vocab_size: int, encoding_size: int, rnn_size: int, num_layers: int = 1, drop_prob: float = 0.5
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.end_id = vocab_size + 1
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

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities of every next word, given the true words before it.

        Args:
            features: (N, E), one image feature per caption.
            labels: (N, D) int64 word ids, 0-padded. A 0 is fed as word 1, which matters to no loss.

        Returns:
            (N, D+2, V+1) log-probabilities; [:, t, k-1] is that of id k at step t.
        """
        tokens = labels.t().clamp(min=1)  # (D, N)
        start = tokens.new_full((1, len(labels)), self.end_id)
        words = self.embedding(torch.cat([start, tokens]) - 1)  # (D+1, N, E)
        hidden, _ = self.lstm(torch.cat([features.unsqueeze(0), words]))  # (D+2, N, H)
        return _log_softmax(self.output(dropout(hidden, self.drop_prob, self.training))).transpose(0, 1)

    def loss_sum(self, encodings: Tensor, image_of_caption: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """Negative log-probability of the captions, each with one END, summed; padding costs nothing.

        Args:
            encodings: (I, E), one per image.
            image_of_caption: (N,) int64, the row of `encodings` that each caption describes, on their device.
            labels: (N, D) int64 word ids, 0-padded, best on the CPU. Words after a 0 are targets too, as in the
                original's LanguageModelCriterion; the first 0 is the END target, further ones are none.

        Returns:
            The sum as a scalar, and the number of targets it is over.
        """
        labels, device = labels.cpu(), encodings.device  # arranged on the CPU, so that a GPU never waits for it
        targets = caption_targets(labels, self.end_id)  # (N, D+1)
        steps = torch.arange(1, targets.shape[1] + 1)
        lengths = torch.where(targets > 0, steps, 0).amax(dim=1) + 1  # steps a caption needs, the image's among them
        # Longest first: then the captions still running at step t are the first counts[t] rows, and the LSTM and the
        # output layer never see a step after the last target.
        order = lengths.argsort(descending=True, stable=True)
        lengths, targets = lengths[order], targets[order]
        counts = (lengths.unsqueeze(0) > torch.arange(int(lengths[0])).unsqueeze(1)).sum(1).tolist()

        inputs = F.pad(labels[order], (1, 0), value=self.end_id).clamp(min=1)  # (N, D+1): START, then the words
        running = [slice(0, count) for count in counts[1:]]
        tokens = torch.cat([inputs[rows, t] for t, rows in enumerate(running)])  # (P,) step by step
        targets = torch.cat([targets[rows, t] for t, rows in enumerate(running)])
        order, tokens = order.to(device, non_blocking=True), tokens.to(device, non_blocking=True)
        words = torch.cat([encodings[image_of_caption][order], self.embedding(tokens - 1)])
        hidden = run_lstm(self.lstm, words, counts)[counts[0] :]  # (P, H), without the image step
        has_target = targets > 0
        if not has_target.all():  # only captions with a 0 amid their words have steps without a target here
            hidden, targets = hidden[has_target.to(device)], targets[has_target]
        columns = (targets - 1).to(device, non_blocking=True)
        hidden = dropout(hidden, self.drop_prob, self.training)
        return output_loss(hidden, self.output.weight, self.output.bias, columns), len(targets)

    def pack(self) -> None:
        """Prepare for searches in bfloat16 on a CPU, as PackedLinear describes; only `start` and `step` work then."""
        layers = [lstm_weights(self.lstm, layer) for layer in range(self.lstm.num_layers)]
        self.packed = [(PackedLinear(w_ih, b_ih), PackedLinear(w_hh, b_hh)) for w_ih, w_hh, b_ih, b_hh in layers]
        self.output = PackedLinear(self.output.weight, self.output.bias)

    def start(self, features: Tensor) -> State:
        """State after the image step, for features (R, E); the next token to feed is START."""
        weight = self.output.weight
        h = weight.new_zeros(self.lstm.num_layers, len(features), self.lstm.hidden_size)
        return self._advance(features.to(weight.dtype), (h, _widen(h)))

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token per row.

        Args:
            tokens: (R,) int64 ids in 1..V+1.
            state: from `start` or an earlier `step`.

        Returns:
            Log-probabilities (R, V+1), float32 or wider, of the next id, and the state after this one.
        """
        state = self._advance(self.embedding(tokens - 1), state)
        return _log_softmax(self.output(state[0][-1])), state

    def _advance(self, inputs: Tensor, state: State) -> State:
        """One LSTM step for inputs (R, E), without dropout: searches run in evaluation mode.

        With half-precision weights the products are in half precision, but the cell, which sums over all steps,
        is float32.
        """
        h, c = [], []
        for layer in range(self.lstm.num_layers):
            if self.packed:
                from_input, from_hidden = self.packed[layer]
                gates = from_input(inputs) + from_hidden(state[0][layer])
            else:
                w_ih, w_hh, b_ih, b_hh = lstm_weights(self.lstm, layer)
                gates = F.linear(inputs, w_ih, b_ih) + F.linear(state[0][layer], w_hh, b_hh)
            i, f, g, o = _widen(gates).chunk(4, dim=1)
            cell = f.sigmoid() * state[1][layer] + i.sigmoid() * g.tanh()
            inputs = (o.sigmoid() * cell.tanh()).to(inputs.dtype)
            h.append(inputs)
            c.append(cell)
        return torch.stack(h), torch.stack(c)


def caption_targets(labels: Tensor, end_id: int) -> Tensor:
    """What each step after the image step shall predict: (N, D) ids, 0-padded -> (N, D+1), 0 where nothing.

    The words themselves, and END at the first 0 or after a caption of full length.
    """
    targets = F.pad(labels, (0, 1))
    first_null = (targets == 0).to(torch.uint8).argmax(dim=1, keepdim=True)
    return targets.scatter(1, first_null, end_id)


def _widen(logits: Tensor) -> Tensor:
    """Half precision is enough for products, not for sums over the vocabulary or over time."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
