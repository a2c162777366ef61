"""What a run did: `metrics` of its lines, and a page with `figures`."""
