"""Engine ``plain``: torch floats, no privacy, the reference."""
