"""What a training step computes: objectives (methods/), teacher weights, attack objectives, and the task that joins
them.
"""
