"""The version of edged and of the protocol between nodes, in one place."""

VERSION = "0.1.0"
PROTOCOL = 1  # raised with every incompatible change of wire.py
