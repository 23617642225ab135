"""What the recipes share: their arguments, the sequence of an experiment, its figures. Nothing else in the package
imports it.
"""
