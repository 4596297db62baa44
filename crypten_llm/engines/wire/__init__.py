"""Engine ``wire``: a Llama on masked wires."""
