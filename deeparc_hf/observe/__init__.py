"""Looking at a running model and leaving no trace: calibration data, forward passes, what dimensions mean, outputs.

May import `architectures`, `similarity` and `core`.
"""
