"""The protocols of engine ``wire``: two parties and a dealer, every secret opened at most once.

Data flows one way: ``kernels`` -> ``dealer`` (roles, masks, correlations, tapes) -> ``opening`` (wires: masked
openings, truncation, lifting; the rounds that carry them) -> ``products``, ``smooth`` (of ``fits``), ``lookup``,
``comparison``, ``selection`` -> the engine.
"""
