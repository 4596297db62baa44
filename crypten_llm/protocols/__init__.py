"""The protocols of engine ``wire``: two parties and a dealer, every secret opened at most once.

Data flows one way: ``kernels`` -> ``dealer`` (roles, masks, correlations, tapes) -> ``secret`` (secrets and wires) ->
``opening`` (masked openings, truncation, lifting) -> ``rounds`` (which carry them) -> ``products``, ``smooth`` (of
``fits``), ``lookup``, ``comparison``, ``selection`` -> the engine.
"""
