"""How is a prompt learned?"""
