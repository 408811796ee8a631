"""Numerical code that several plugins share: data rows, wire codecs, privacy, sparse tuning.

It imports no plugin, and no daemon loads it.
"""
