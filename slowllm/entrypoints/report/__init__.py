"""What did a run do, and where did its time go? One HTML file that needs nothing else."""
