"""Checkpoints of patched models that several releases of transformers wrote, with what they give.

`python -m tests.saved` in an environment of tox writes those of its release.
"""
