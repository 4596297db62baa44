"""INSECURE by purpose: everything that opens secrets to look at them, for debugging on one machine."""
