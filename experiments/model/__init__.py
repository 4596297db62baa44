"""The shipped model: its corpus, training and evaluation, and the networks of trained policies."""
