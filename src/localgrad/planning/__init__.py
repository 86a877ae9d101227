"""The planner: memory of a step, predicted and measured."""
