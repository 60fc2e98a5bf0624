"""What fits, what stays, and how long will it take? Pure arithmetic: no torch, no files."""
