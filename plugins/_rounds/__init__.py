"""What the rounds of a federated training share: masking, cohorts, buffered pushes, checks of updates.

Numpy and no torch. It imports no plugin, and no daemon loads it.
"""
