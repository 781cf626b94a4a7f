"""Which component, which field or tensor makes a pipeline blurry: facts, weights, swaps, precision, evidence, and a verdict that mends."""
