"""How is a model opened for a job on this machine, measured and resumed?"""
