"""Convert weights between the layouts of SAT and diffusers: facts, name tables, plans, writing, output comparison."""
