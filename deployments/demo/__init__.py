"""The main job: a corpus from installed packages, and the recipes that run on it."""
