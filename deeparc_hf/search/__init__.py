"""Search: the best blocks to remove for each number of them, by what the model puts out, with healing in the loop; and
pruning without a Trainer, by a search or by similarity.

May import `pruning`, `healing` and what is below them.
"""
