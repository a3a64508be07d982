"""How good and how fast: the check against FP16, speed, memory, reports."""
