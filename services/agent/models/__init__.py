"""Language models: what they are asked and what they answer, those of providers, and one that needs none."""
