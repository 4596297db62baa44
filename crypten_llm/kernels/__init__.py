"""Kernels: loops over ring elements, by device. Owns arithmetic and nothing of a protocol: no kernel knows a role."""
