"""Ways to compute the same attention. Each module has ``block_attention`` of one signature."""
