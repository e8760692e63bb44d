"""The paper in miniature: what an election discards, and what slack gives back. See docs/low_resource.md."""
