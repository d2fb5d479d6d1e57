"""Training: tasks, recipes, and the run around them."""
