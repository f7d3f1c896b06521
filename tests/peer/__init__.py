"""A peer's suite: transformers' own tests of its models, run on patched ones."""
