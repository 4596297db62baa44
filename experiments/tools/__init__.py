"""What the experiments share: how commands end, journals, processes, intervals, tables, where a result came from."""
