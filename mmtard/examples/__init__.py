"""The quickstart, and what studies are made of: rendered images, CIFAR in splits, tiny CLIPs."""
