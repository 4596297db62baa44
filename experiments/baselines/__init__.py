"""What `experiments/compare_baselines.py` is made of: its configuration, cells, summary, tables and pictures."""
