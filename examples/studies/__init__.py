"""What the studies have in common: places of things in made scenes, plans of experiments, and results."""
