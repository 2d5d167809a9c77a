"""A training iteration of the language model against a straightforward nn.LSTM with cross-entropy over all steps.

16 images with 5 captions each, features given, rnn 512, encoding 512, 9,567 words, lengths like COCO's; forward,
backward, clipping and Adam. The original needs 496-539 ms on a machine with two such cores.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.coco_shaped import CAPTIONS, V, random_captions
from bench.gpu_train import make_trainer
from bench.timing import dtypes, interleave, milliseconds, ratio
from captioner.data.batch import Batch, FeatureInputs, KnownCaptions
from captioner.model.choices import CnnLayer, DecoderKind
from captioner.model.config import ModelConfig
from captioner.model.packed_captions import caption_targets
from captioner.runtime.memory import keep_freed_memory
from captioner.training.loop import update

WIDTH, IMAGES = 512, 16
ORIGINAL_MS = 496


def run() -> None:
    """Print a Markdown table: ms per iteration, and how many times faster than the plain one and the original."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    features = torch.rand(IMAGES, WIDTH, device=device)
    captions = random_captions(np.random.default_rng(0), IMAGES * CAPTIONS)
    labels = torch.from_numpy(captions.astype(np.int64))
    names = {torch.float32: "fp32", torch.bfloat16: "bf16 autocast"}
    wanted = {names[dtype]: dtype for dtype in dtypes(device)}
    plain = {f"plain, {name}": plain_iteration(features, labels.to(device), dtype) for name, dtype in wanted.items()}
    ours = {f"captioner, {name}": our_iteration(features, labels, dtype) for name, dtype in wanted.items()}
    seconds = interleave(plain)
    # From here on as the commands do: the plain iteration is measured before and after.
    keep_freed_memory()
    kept = interleave(plain | ours)
    print(f"Training iteration, {len(labels)} captions on {device} ({torch.get_num_threads()} threads)\n")
    print("| | ms | plain fp32 / this | original's least / this |\n|---|---|---|---|")
    for name, values in [*seconds.items(), *((f"{name}, freed memory kept", times) for name, times in kept.items())]:
        baseline = seconds["plain, fp32"] if name in seconds else kept["plain, fp32"]
        original = [ORIGINAL_MS / 1000] * len(values)
        print(f"| {name} | {milliseconds(values)} | {ratio(baseline, values)} | {ratio(original, values)} |")


def our_iteration(
    features: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    decoder: DecoderKind = "lstm",
    cnn_layer: CnnLayer = "pool5",
) -> Callable[[], object]:
    """What caption-train runs for a batch with cached features."""
    widths = (1,) * 12 + (WIDTH,)
    config = ModelConfig(V, encoding_size=WIDTH, cnn_layer=cnn_layer, conv_widths=widths, decoder=decoder)
    trainer = make_trainer(config, features.device, dtype)
    captions = KnownCaptions(labels, torch.arange(IMAGES).repeat_interleave(CAPTIONS))
    batch = Batch([{}] * IMAGES, list(range(IMAGES)), FeatureInputs(features), captions)
    return lambda: update(trainer, batch, 0, rate_factor=1.0, finetune=False).item()


def plain_iteration(features: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """The same model, as one would write it down: every caption runs to the greatest length."""
    model = nn.ModuleDict(
        {"words": nn.Embedding(V + 1, WIDTH), "lstm": nn.LSTM(WIDTH, WIDTH), "output": nn.Linear(WIDTH, V + 1)}
    ).to(features.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4, betas=(0.8, 0.999))
    start = labels.new_full((len(labels), 1), V + 1)
    targets = caption_targets(labels, V + 1) - 1

    def iterate() -> None:
        optimizer.zero_grad()
        with torch.autocast(features.device.type, dtype, enabled=dtype != torch.float32):
            words = model["words"](torch.cat([start, labels], 1).clamp(min=1) - 1)
            inputs = torch.cat([features.repeat_interleave(CAPTIONS, 0).unsqueeze(1), words], 1)
            hidden, _ = model["lstm"](inputs.transpose(0, 1))
            logits = model["output"](F.dropout(hidden[1:], 0.5))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.t().flatten(), ignore_index=-1)
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
        loss.item()

    return iterate
