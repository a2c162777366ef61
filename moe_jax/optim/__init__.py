"""How parameters change: optimisers, and which steps are skipped."""
