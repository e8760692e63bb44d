"""The time of every kind of merge in memory, as a multiple of the simplest one."""
