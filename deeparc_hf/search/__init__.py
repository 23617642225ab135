"""Search: the best blocks to remove for each number of them, by what the model puts out, with healing in the loop.

May import `pruning`, `healing` and what is below them.
"""
