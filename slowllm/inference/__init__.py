"""How likely is a text, and what comes next?"""
