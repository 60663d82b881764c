"""Recipes, the demo, and the command line: everything around the flows."""
