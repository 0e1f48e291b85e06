"""`quantize`: how the codes of weights are found."""
