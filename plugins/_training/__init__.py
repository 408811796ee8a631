"""What every kind of training job has: its file's keys, its links and their sizes, its rows, its checkpoints.

It imports no plugin. `file`, `sizes` are light: the daemon plans with them; the rest is a worker's.
"""
