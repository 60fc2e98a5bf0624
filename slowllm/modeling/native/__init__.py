"""Which tensors of a checkpoint are stored in a quantised format of its maker?"""
