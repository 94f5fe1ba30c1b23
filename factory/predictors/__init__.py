"""Downstream models: what is trained on real and synthetic images to see whether the synthetic ones help."""
