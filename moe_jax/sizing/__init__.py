"""What a config needs before it runs: by arithmetic, and by a compiler."""
