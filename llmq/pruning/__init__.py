"""`prune`: which weights, heads, channels or layers go."""
