"""Between the SAT and the diffusers layout: facts, tables, plans and proofs."""
