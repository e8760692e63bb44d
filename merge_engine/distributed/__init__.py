"""A merge on many machines: Ray maps the jobs of ``engine/shards.py`` over the nodes of a cluster.

Nothing of Ray is imported before a merge uses it, and none of this package computes: nodes do ordinary jobs.
"""
