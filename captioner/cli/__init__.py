"""The commands: options in, exit code out. Nothing else imports them."""

import os
import signal
import sys

# Until a command's own code takes over (options.run), an interruption must end it without a traceback from among the
# imports. In another program than a command of ours, as a test's, "-m" and such names do not stand here.
of_ours = os.path.basename(sys.argv[0]).startswith("caption-") or sys.argv[0] == "-m"
if of_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
