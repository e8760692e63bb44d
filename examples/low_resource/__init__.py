"""The paper in miniature: losses to the election, and the effect of slack. See docs/low_resource.md."""
