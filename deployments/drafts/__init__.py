"""Recipes for data that was looked at, as text: `lines` they are made of, of `text` and of `records`."""
