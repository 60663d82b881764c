"""Models: presets, building, adapters, loading, generation. Leans on transformers and peft."""
