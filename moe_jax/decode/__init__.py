"""What a trained decoder writes."""
