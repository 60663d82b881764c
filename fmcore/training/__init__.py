"""TokenShards -> Checkpoint: one flat loop for all stages, in a process of its own, resumed exactly."""
