"""The wire engine's protocols: two parties and a dealer, every secret opened at most once.

Data flows one way: ``ring`` (arithmetic modulo 2^64), ``shapes`` (what the dealer has of it) -> ``dealing`` (roles,
masks, correlations) -> ``opening`` (wires: masked openings, truncation, lifting) -> ``products``, ``fourier``, ``dcf``,
``normalize``, ``lookup``, ``comparison``, ``selection`` -> the engine.
"""
