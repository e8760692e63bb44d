"""merge_engine inside other tools. Each tool has a module of its own, and is not imported before it is used."""
