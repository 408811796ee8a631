"""Profiles of real device classes, one commented TOML file each."""
