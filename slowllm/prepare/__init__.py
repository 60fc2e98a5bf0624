"""How does a checkpoint get onto this disk, whole, and into fewer bytes?"""
