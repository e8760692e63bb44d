"""What a merge tells about itself: its counts, its ledger, the digests, the manifest and the model card."""
