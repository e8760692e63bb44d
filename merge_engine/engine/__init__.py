"""The engine: plan, stream, publish."""
