"""Where the model looked: a map over the picture for each word of a caption.

Where the language model attends, the map is its attention. Elsewhere it is how the word's log-probability changes with
the last convolution block: the gradient by each of its cells, times what the cell holds, summed over channels
(gradient × activation; with the `pool5` head the same as Grad-CAM, Selvaraju et al. 2017; with fc7 as HiResCAM, Draelos
& Carin 2020). What speaks against the word counts as 0.

Letters: N images, D words of the longest caption, C channels, S cells in a row of the grid (7, or 14 of conv5_3), G of
all (S²).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.caption_model import CaptionModel
from captioner.runtime.transfers import upload


def heat_maps(model: CaptionModel, grid: Tensor, captions: Sequence[Sequence[int]]) -> list[list[bytes]]:
    """A map for each word of each image's caption.

    Args:
        model: in evaluation mode; its decoder in float32.
        grid: (N, C, S, S), what `model.last_block` gave for the images.
        captions: N captions as word ids.

    Returns:
        For each image, for each word: G bytes, the cells of the centre crop row by row, 255 the hottest of this word
        and 0 what did not count; all 0 where nothing speaks for the word.
    """
    longest = max(map(len, captions), default=0)
    if longest == 0:
        return [[] for _ in captions]
    padded = torch.tensor([[*caption, *[0] * (longest - len(caption))] for caption in captions])
    labels = upload(padded, grid.device)
    # A copy: what was computed in inference mode takes no part in gradients.
    heat = word_heat(model, grid.clone().float(), labels).clamp(min=0)
    heat = heat / heat.amax(dim=2, keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    quantised = (255 * heat).round().to(torch.uint8).cpu().numpy()
    return [[row.tobytes() for row in rows[: len(caption)]] for rows, caption in zip(quantised, captions, strict=True)]


def word_heat(model: CaptionModel, grid: Tensor, labels: Tensor) -> Tensor:
    """What each cell of the last convolution block contributes to each word.

    Args:
        grid: float32 (N, C, S, S), the output of the last block.
        labels: int64 (N, D) word ids, 0-padded.

    Returns:
        float32 (N, D, G): attention weights, or how fast the word's log-probability rises with a cell's scale.
    """
    if isinstance(model.decoder, AttentionDecoder):
        with torch.no_grad():
            return model.decoder.attention(model.encode_features(model.encoder.head(grid)), labels)[
                :, : labels.shape[1]
            ]
    # cuDNN's LSTM has no gradient in evaluation mode.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        grid = grid.detach().requires_grad_()
        logprobs = model.decoder(model.encode_features(model.encoder.head(grid)), labels)
        heat = []
        for word in range(labels.shape[1]):
            # Step 0 reads the image, and step 1, which reads START, predicts word 0.
            of_word = logprobs[:, word + 1].gather(1, (labels[:, word] - 1).clamp(min=0).unsqueeze(1))
            (gradient,) = torch.autograd.grad(of_word.sum(), grid, retain_graph=True)  # images do not mix
            heat.append((gradient * grid).sum(1).flatten(1))
    return torch.stack(heat, 1).detach()
