"""What the experiments share: how commands end, journals, processes, intervals, where a result came from."""
