"""The protocols of engine ``wire``: two parties and a dealer, every secret opened at most once.

Data flows one way: ``kernels`` -> ``dealer`` (roles, masks, correlations, tapes) -> ``opening`` (wires: masked
openings, truncation, lifting) -> ``products``, ``fourier``, ``normalize``, ``lookup``, ``comparison``, ``selection`` ->
the engine.
"""
