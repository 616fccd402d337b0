"""A comparison of objectives at an equal budget: CIFAR-10, small towers, one machine, every run a configuration in configs/cifar10."""
