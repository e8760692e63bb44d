"""Looking at checkpoints that are there: an output against its manifest, and one checkpoint against another."""
