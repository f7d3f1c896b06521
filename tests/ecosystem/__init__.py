"""Patched models in the hands of other tools, of the versions that tox.ini names."""
