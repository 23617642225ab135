"""What everything else is built on: settings, registries, transactions, processes, text of others, tables, files.

May import `errors` alone.
"""
