"""Commands behind every figure of the documentation."""
