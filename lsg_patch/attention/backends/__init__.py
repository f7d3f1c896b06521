"""Ways to compute the same attention: each has ``block_attention``, of ``Blocks``."""
