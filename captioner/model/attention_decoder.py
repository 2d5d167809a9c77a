"""The attending language model: two LSTMs, between which each word looks at the photo's grid (after Xu et al. 2015,
Anderson et al. 2018, Vaswani et al. 2017; `--decoder attention`).

Shapes: N images, G cells of a photo's grid (49 or 196), M captions, D words of the longest, V words, E encoding,
H hidden, A heads of d = H/A numbers, R rows of a running search, P rows of a packed batch.

A step reads one token. LSTM 1 reads it beside the mean of the grid; its hidden state asks, head by head, which cells
matter now; LSTM 2 reads their weighted mean and the state of LSTM 1, and predicts the next word. LSTM 2 does not feed
back into LSTM 1, so that in training each layer, and the attention between them, runs over all words at once.

Step 0 reads START; what step t predicts is word t (0-based) of the caption, and END after its last word. Ids are
1-based: words 1..V, START = END = V+1 with one embedding row, 0 is padding. The output layer shares the embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
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
class RowsOfImages:
    """Which image each of R rows belongs to, and where the rows stand when those of an image are side by side.

    Attributes:
        image: (R,) int64.
        place: (R,) int64 in 0..N·width-1, or None where row r has place r.
        width: places per image.
    """

    image: Tensor
    place: Tensor | None
    width: int

    @classmethod
    def of(cls, image: Tensor, num_images: int) -> "RowsOfImages":
        """Rows in any order, any number of them per image, for image (R,)."""
        order = image.argsort(stable=True)
        counts = torch.bincount(image, minlength=num_images)
        width = int(counts.max())
        first = (counts.cumsum(0) - counts)[image[order]]
        place = torch.empty_like(image)
        place[order] = image[order] * width + torch.arange(len(image), device=image.device) - first
        return cls(image, place, width)

    @classmethod
    def grouped(cls, image: Tensor, counts: Tensor) -> "RowsOfImages":
        """Rows that already stand image by image, counts (N,) of them each."""
        width = int(counts.max())
        if width * len(counts) == len(image):
            return cls(image, None, width)
        return cls.of(image, len(counts))

    @classmethod
    def even(cls, num_images: int, per_image: int, device: torch.device) -> "RowsOfImages":
        """Rows that stand image by image, as many of each."""
        return cls(torch.arange(num_images * per_image, device=device) // per_image, None, per_image)

    def to(self, device: torch.device) -> "RowsOfImages":
        place = None if self.place is None else upload(self.place, device)
        return RowsOfImages(upload(self.image, device), place, self.width)

    def gather(self, rows: Tensor, num_images: int) -> Tensor:
        """(R, H) -> (N, width, H), 0 where an image has fewer rows."""
        if self.place is None:
            return rows.unflatten(0, (num_images, self.width))
        places = rows.new_zeros(num_images * self.width, rows.shape[1]).index_copy(0, self.place, rows)
        return places.unflatten(0, (num_images, self.width))

    def scatter(self, places: Tensor) -> Tensor:
        """The way back: (N, width, H) -> (R, H)."""
        rows = places.flatten(0, 1)
        return rows if self.place is None else rows.index_select(0, self.place)


@dataclass(frozen=True)
class AttentionState:
    """A running search: what belongs to a photo is there once, however many beams look at it.

    Attributes:
        keys, values: (N, A, G, d) of the photos' grids.
        from_mean: (N, 4H) what the mean of a grid adds to the gates of LSTM 1.
        rows: the image of each row; the rows of an image stand together, images in order.
        h1, c1, h2, c2: (R, H); cells float32 or wider.
        products: the decoder's matrix products by name.
    """

    keys: Tensor
    values: Tensor
    from_mean: Tensor
    rows: RowsOfImages
    h1: Tensor
    c1: Tensor
    h2: Tensor
    c2: Tensor
    products: Mapping[str, Callable[[Tensor], Tensor]]

    @property
    def device(self) -> torch.device:
        return self.h1.device

    def select(self, rows: Tensor, per_image: int | None = None) -> "AttentionState":
        """The state whose row i goes on from row rows[i] of this one; images without rows are forgotten.

        Args:
            rows: int64, such that images stay in order and together.
            per_image: how many each image has, where all have as many.
        """
        if per_image is not None:  # nothing to count, for which the host would wait for a GPU
            images = self.rows.image[rows[::per_image]]
            same = len(images) == len(self.keys) and (self.rows.place, self.rows.width) == (None, per_image)
            grouped = self.rows if same else RowsOfImages.even(len(images), per_image, rows.device)
        else:
            images, image, counts = torch.unique_consecutive(
                self.rows.image[rows], return_inverse=True, return_counts=True
            )
            grouped = RowsOfImages.grouped(image, counts)
        state = replace(
            self,
            rows=grouped,
            h1=self.h1[rows],
            c1=self.c1[rows],
            h2=self.h2[rows],
            c2=self.c2[rows],
        )
        if len(images) == len(self.keys):
            return state
        return replace(state, keys=self.keys[images], values=self.values[images], from_mean=self.from_mean[images])


class AttentionDecoder(nn.Module):
    """Language model over V words that attends to the encoded grid (N, G, E) of an image.

    Args:
        vocab_size: V, the number of words without START/END.
        encoding_size: E, width of the encoded grid and of the word embeddings.
        rnn_size: H, width of both LSTMs; a multiple of `heads`.
        heads: A, places that are looked at at a time.
        drop_prob: dropout before the output layer, in training mode only, as the next.
        drop_prob_words: dropout of the embedded words.
    """

    # Whatever has one row per word, and a last one for END (which is START in the embedding).
    rows_of_words: ClassVar = ("embedding.weight", "output_bias")

    def __init__(
        self,
        vocab_size: int,
        encoding_size: int,
        rnn_size: int,
        heads: int = 8,
        drop_prob: float = 0.5,
        drop_prob_words: float = 0.3,
    ) -> None:
        super().__init__()
        assert rnn_size % heads == 0
        self.vocab_size = vocab_size
        self.end_id = end_id_of(vocab_size)
        self.heads = heads
        self.drop_prob, self.drop_prob_words = drop_prob, drop_prob_words
        # As the output layer the embedding wants small values, as the input of an LSTM values of about 1.
        self.word_scale = encoding_size**0.5
        # from_pretrained, for the constructor would draw initial values only to have them drawn again below.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size + 1, encoding_size), freeze=False)
        self.lstm1 = nn.LSTM(2 * encoding_size, rnn_size)
        self.query = nn.Linear(rnn_size, rnn_size, bias=False)
        self.key = nn.Linear(encoding_size, rnn_size, bias=False)
        self.value = nn.Linear(encoding_size, rnn_size)
        self.lstm2 = nn.LSTM(2 * rnn_size, rnn_size)
        self.head = nn.Linear(rnn_size, encoding_size)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size + 1))
        self.packed: dict[str, PackedLinear] = {}  # after `pack`: the products of a search step
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings N(0, 1/E); LSTMs uniform (Glorot) and orthogonal, forget gates open; the rest as torch does."""
        if self.embedding.weight.is_meta:  # no values to set; torch would import its compiler to do nothing, 1 s
            return
        nn.init.normal_(self.embedding.weight, std=1 / self.word_scale)
        for lstm in (self.lstm1, self.lstm2):
            w_ih, w_hh, b_ih, b_hh = lstm_weights(lstm, 0)
            nn.init.xavier_uniform_(w_ih)
            nn.init.orthogonal_(w_hh)
            nn.init.zeros_(b_hh)
            nn.init.zeros_(b_ih)
            nn.init.ones_(b_ih[lstm.hidden_size : 2 * lstm.hidden_size])

    def forward(self, encodings: Tensor, labels: Tensor, image_of_caption: Tensor | None = None) -> Tensor:
        """Log-probabilities of every next word, given the true words before it.

        Args:
            encodings: (N, G, E), the images' encoded grids.
            labels: (M, D) int64 word ids, 0-padded. A 0 is fed as word 1, which matters to no loss.
            image_of_caption: (M,) int64; None: caption i describes image i.

        Returns:
            (M, D+1, V+1) log-probabilities; [:, t, k-1] is that of id k as word t.
        """
        keys, values = self._keys_and_values(encodings)
        hidden1 = self._first_hidden(encodings, labels, image_of_caption)  # (M, D+1, H)
        queries = self._split_heads(self.query(hidden1))
        if image_of_caption is not None:
            keys, values = keys[image_of_caption], values[image_of_caption]
        context = _join_heads(F.scaled_dot_product_attention(queries, keys, values))  # (M, D+1, H)
        hidden2, _ = self.lstm2(torch.cat([context, hidden1], 2).transpose(0, 1))
        output = self.head(dropout(hidden2, self.drop_prob, self.training))
        return log_softmax(F.linear(output, self.embedding.weight, self.output_bias)).transpose(0, 1)

    def attention(self, encodings: Tensor, labels: Tensor, image_of_caption: Tensor | None = None) -> Tensor:
        """Where the model looked for each word of a caption; arguments as for `forward`.

        Returns:
            (M, D+1, G) weights that sum to 1, the mean of the heads; [:, t] is for word t, the last for END.
        """
        keys, _ = self._keys_and_values(encodings)
        if image_of_caption is not None:
            keys = keys[image_of_caption]
        queries = self._split_heads(self.query(self._first_hidden(encodings, labels, image_of_caption)))
        scores = queries @ keys.transpose(2, 3) / queries.shape[3] ** 0.5  # (M, A, D+1, G)
        return scores.softmax(3).mean(1)

    def output_of(
        self, encodings: Tensor, image_of_caption: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the loss is of: all that `kernels.output_loss` wants.

        Args:
            encodings: (N, G, E), the images' encoded grids.
            image_of_caption, labels: as of `CaptionModel.loss_sum`.

        Returns:
            (P, H) that enters the output layer, its weight (V+1, H) and bias (V+1,), and the targets' columns (P,).
        """
        device = encodings.device
        captions = pack_captions(labels.cpu(), self.end_id)  # on the CPU, so that a GPU does not wait at every turn
        rows = RowsOfImages.of(image_of_caption.cpu()[captions.caption], len(encodings)).to(device)
        hidden = self._hidden(encodings, rows, upload(captions.tokens, device), captions.counts)
        hidden, columns = captions.with_targets(hidden)
        output = self.head(dropout(hidden, self.drop_prob, self.training))
        return output, self.embedding.weight, self.output_bias, columns

    def _hidden(self, encodings: Tensor, rows: RowsOfImages, tokens: Tensor, counts: list[int]) -> Tensor:
        """The states (P, H) of LSTM 2 for tokens (P,), counts[t] of them at step t."""
        mean = encodings.mean(1)  # (N, E)
        hidden1 = run_lstm(self.lstm1, torch.cat([self._words(tokens), mean[rows.image]], 1), counts)
        keys, values = self._keys_and_values(encodings)
        context = self._attend(self.query(hidden1), keys, values, rows)
        return run_lstm(self.lstm2, torch.cat([context, hidden1], 1), counts)

    def _first_hidden(self, encodings: Tensor, labels: Tensor, image_of_caption: Tensor | None) -> Tensor:
        """The states (M, D+1, H) of LSTM 1 along the captions."""
        tokens = labels.t().clamp(min=1)  # (D, M)
        start = tokens.new_full((1, len(labels)), self.end_id)
        words = self._words(torch.cat([start, tokens]))  # (D+1, M, E)
        mean = encodings.mean(1)
        if image_of_caption is not None:
            mean = mean[image_of_caption]
        hidden, _ = self.lstm1(torch.cat([words, mean.expand(len(words), -1, -1)], 2))
        return hidden.transpose(0, 1)

    def _words(self, tokens: Tensor) -> Tensor:
        return dropout(self.embedding(tokens - 1) * self.word_scale, self.drop_prob_words, self.training)

    def _keys_and_values(self, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """Each (N, A, G, d)."""
        return self._split_heads(self.key(encodings)), self._split_heads(self.value(encodings))

    def _split_heads(self, tensor: Tensor) -> Tensor:
        """(N, T, H) -> (N, A, T, d)."""
        return tensor.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, rows: RowsOfImages) -> Tensor:
        """The context (R, H) of queries (R, H), all those of an image against its one grid."""
        grouped = self._split_heads(rows.gather(queries, len(keys)))  # (N, A, width, d)
        return rows.scatter(_join_heads(F.scaled_dot_product_attention(grouped, keys, values)))

    # Searching

    def start(self, encodings: Tensor) -> AttentionState:
        """State before START, the next token to feed, for encodings (N, G, E); one row per image."""
        grid = encodings.to(self.embedding.weight.dtype)
        keys, values = self._keys_and_values(grid)
        products: Mapping[str, Callable[[Tensor], Tensor]] = self.packed or {
            name: partial(F.linear, weight=weight, bias=bias) for name, (weight, bias) in self._weights().items()
        }
        rows = RowsOfImages.even(len(grid), 1, grid.device)
        h = keys.new_zeros(len(grid), self.lstm1.hidden_size)
        c = widen(h)
        return AttentionState(keys, values, products["mean"](grid.mean(1)), rows, h, c, h, c, products)

    def step(self, tokens: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """Feed one token per row.

        Args:
            tokens: (R,) int64 ids in 1..V+1.
            state: from `start` or an earlier `step`.

        Returns:
            Log-probabilities (R, V+1), float32 or wider, of the next id, and the state after this one.
        """
        product, image = state.products, state.rows.image
        words = self._words(tokens)
        h1, c1 = lstm_cell(state.from_mean[image] + product["word"](words) + product["hidden1"](state.h1), state.c1)
        context = self._attend(product["query"](h1), state.keys, state.values, state.rows)
        inputs = torch.cat([context, h1], 1)
        h2, c2 = lstm_cell(product["input2"](inputs) + product["hidden2"](state.h2), state.c2)
        logits = product["output"](product["head"](dropout(h2, self.drop_prob, self.training)))
        return log_softmax(logits), replace(state, h1=h1, c1=c1, h2=h2, c2=c2)

    def pack(self) -> None:
        """Prepare for searches in bfloat16 on a CPU, as PackedLinear describes; only `start` and `step` change."""
        for name, (weight, bias) in self._weights().items():
            zeros = weight.new_zeros(len(weight)) if bias is None else bias
            self.packed[name] = PackedLinear(weight.contiguous(), zeros)

    def _weights(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weight and bias of the products of a search step, and of the one ("mean") that an image needs once."""
        w_ih1, w_hh1, b_ih1, b_hh1 = lstm_weights(self.lstm1, 0)
        w_ih2, w_hh2, b_ih2, b_hh2 = lstm_weights(self.lstm2, 0)
        width = self.embedding.embedding_dim
        return {
            "mean": (w_ih1[:, width:], b_ih1 + b_hh1),
            "word": (w_ih1[:, :width], None),
            "hidden1": (w_hh1, None),
            "query": (self.query.weight, None),
            "input2": (w_ih2, b_ih2),
            "hidden2": (w_hh2, b_hh2),
            "head": (self.head.weight, self.head.bias),
            "output": (self.embedding.weight, self.output_bias),
        }


def _join_heads(tensor: Tensor) -> Tensor:
    """(N, A, T, d) -> (N, T, H)."""
    return tensor.transpose(1, 2).flatten(2)
