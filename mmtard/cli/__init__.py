"""One file a group of commands: the arguments, and under them what the command does."""
