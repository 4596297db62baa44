"""Engine ``crypten``: CrypTen's own protocols, the baseline."""
