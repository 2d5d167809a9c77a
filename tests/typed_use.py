"""How a typed program uses the Python interface. mypy checks this, nobody runs it: an ignored error must be one."""

from collections.abc import Iterator
from pathlib import Path

from typing_extensions import assert_type

import captioner

model = captioner.load_model(["a.pt", Path("b.pt")], device="cpu", precision="fp32")
assert_type(model.caption("cat.jpg", beam_size=3, seed=1), captioner.Caption)
assert_type(model.caption(["cat.jpg", b""], n_best=2), list[captioner.Caption])
assert_type(model.caption_folder(Path("photos"), recursive=True, beam_size=3), Iterator[captioner.Caption])
assert_type(model.logprob("cat.jpg", "a cat"), float)
assert_type(model.logprob("cat.jpg", ["a cat", "a dog"]), list[float])
for word in model.caption("cat.jpg").words:
    assert_type(word.logprob, float)

scored = captioner.score(model.caption(["cat.jpg"]), "references.json", metrics="all")
assert_type(scored.corpus, dict[str, float])

model.caption("cat.jpg", beamsize=3)  # type: ignore[call-overload]
model.caption("cat.jpg", on_error="ignore")  # type: ignore[call-overload]
captioner.load_model(precision="fp64")  # type: ignore[arg-type]
