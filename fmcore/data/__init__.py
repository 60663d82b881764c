"""Raw data -> Documents: read, normalise, filter, deduplicate, split, write."""
