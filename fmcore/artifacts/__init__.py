"""Typed artifacts in a content-addressed store: what every step takes and gives. Loads without torch."""
