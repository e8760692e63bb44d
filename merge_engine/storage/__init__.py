"""Bytes: files read past the page cache or mapped from it, mounts, and what this machine has."""
