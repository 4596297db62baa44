"""Correlated randomness: who draws it (``roles``), what it comes from (``randomness``), and tapes of it."""
