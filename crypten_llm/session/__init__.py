"""A session: parties that start, load a model, answer requests and report what that cost and revealed."""
