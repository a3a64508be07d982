"""What to make: recipes, samples, hub downloads and the embedded model."""
