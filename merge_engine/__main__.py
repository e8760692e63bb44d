"""``python -m merge_engine`` is the same as ``merge-engine``."""

import sys

# Python puts the folder that it is started in first. It may be that of a checkpoint: nothing in it is imported.
if not getattr(sys.flags, "safe_path", False):  # Python 3.10 has no such flag
    del sys.path[0]

from merge_engine.cli import main

main()
