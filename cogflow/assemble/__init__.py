"""From components to one checked pipeline folder."""
