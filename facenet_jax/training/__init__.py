"""State, one jitted step, loop, optimisers and schedules, checkpoints."""
