"""``python -m merge_engine`` is the same as ``merge-engine``."""

from merge_engine.cli import main

main()
