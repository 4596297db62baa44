"""Names of the presets of engine ``wire``'s numbers, without what they are (``engines.wire.numbers``)."""

DEFAULT, QUANTISED = "default", "quantised"
PRECISIONS = DEFAULT, QUANTISED
