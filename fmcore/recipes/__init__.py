"""Recipes: one YAML file, one frozen pydantic tree, one flow parameter. Loads without torch."""
