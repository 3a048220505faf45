"""Updates of blocks that lie on several processes: who computes what, and what moves for it."""
