"""What the rounds of a federated training share: sums of masked updates.

Numpy and no torch. It imports no plugin, and no daemon loads it.
"""
