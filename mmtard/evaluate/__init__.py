"""How robust a model is: accuracy on clean images and under attack, with its uncertainty, sharded over the ranks, by a named protocol."""
