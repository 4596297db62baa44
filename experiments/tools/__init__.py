"""What the experiments share: how commands end, files of results and where these came from, processes, intervals,
tables."""
