"""Where the original's files and numbers are.

The folder named by CAPTIONER_REFERENCE (another set of the same layout), else ../shared/reference/neuraltalk2, else the
part of it that a clone carries.
"""

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared" / "reference" / "neuraltalk2"
CARRIED = HERE / "data" / "neuraltalk2"
REFERENCE = Path(os.environ.get("CAPTIONER_REFERENCE", SHARED if SHARED.is_dir() else CARRIED))
