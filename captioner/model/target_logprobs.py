"""What a language model thinks of given captions, word by word."""

from torch import Tensor

from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.decoder import Decoder
from captioner.model.packed_captions import caption_targets


def target_logprobs(
    decoder: Decoder | AttentionDecoder, encodings: Tensor, labels: Tensor, image_of_caption: Tensor | None = None
) -> Tensor:
    """Natural log-probability of every word of a caption and of END after it.

    Args:
        encodings: (N, E) or (N, G, E), what the decoder sees of each image.
        labels: (M, D) int64 word ids, 0-padded.
        image_of_caption: (M,) int64; None: caption i describes image i.

    Returns:
        (M, D+1) float32, 0 after END.
    """
    targets = caption_targets(labels, decoder.end_id)  # (M, D+1)
    logprobs = decoder(encodings, labels, image_of_caption)[:, -targets.shape[1] :]  # an image step predicts nothing
    chosen = logprobs.gather(2, (targets - 1).clamp(min=0).unsqueeze(2)).squeeze(2)
    return chosen.where(targets > 0, 0.0)
