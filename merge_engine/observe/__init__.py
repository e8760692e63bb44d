"""Records of a merge: counts, ledger, digests, manifest and model card."""
