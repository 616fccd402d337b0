"""What `mmtard bench` measures: how fast training, evaluation and loading are, beside what they are compared with."""
