"""What a trained model is worth, beside its loss."""
