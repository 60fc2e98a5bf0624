"""How are a tensor's bytes coded, and how are they decoded or multiplied as they are?"""
