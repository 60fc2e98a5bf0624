"""How does transformers' own model compute with weights that come and go?"""
