"""The commands: options in, exit code out. Nothing else imports them."""

import os
import signal
import sys
from types import FrameType

# Until a command's own code takes over (options.run), an interruption must end it without a traceback from among the
# imports. In another program than a command of ours, as a test's, "-m" and such names do not stand here.
_name = os.path.basename(sys.argv[0])


def _interrupted(_: int, __: FrameType | None) -> None:
    try:
        os.write(2, f"{_name if _name.startswith('caption-') else 'captioner'}: interrupted\n".encode())
    finally:
        os._exit(130)


_by_module = _name == "-m" or sys.argv[0].endswith(os.path.join("captioner", "__main__.py"))
of_ours = _by_module or _name.startswith("caption-")
if of_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)
