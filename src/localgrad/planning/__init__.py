"""The planner: predict and measure the memory of a training step."""
