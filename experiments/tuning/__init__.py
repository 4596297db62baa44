"""What `experiments/tune.py` is made of: the space, the goal, what is measured, and the search."""
