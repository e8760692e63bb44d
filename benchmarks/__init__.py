"""Speed and memory of merge_engine, measured against a bare copy of the same bytes and against mergekit."""
