"""A run on a Slurm cluster: which nodes it may use, how its starts ended, and what the batch script does next."""
