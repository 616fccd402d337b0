"""The quickstart and the comparison on CIFAR-10."""
