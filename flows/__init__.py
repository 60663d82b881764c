"""The flows: four recipe kinds over the same five calls."""
