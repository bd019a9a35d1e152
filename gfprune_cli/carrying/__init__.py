"""Adapters of the dense network for the pruned one."""
