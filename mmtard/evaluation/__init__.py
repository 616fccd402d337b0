"""How robust a model is: protocols, datasets, measurement over ranks, results, comparison."""
