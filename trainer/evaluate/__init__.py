"""How a model is scored: windows over a stream, summed into bits per byte, audited."""
