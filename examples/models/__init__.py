"""The two models of `shared_model.py`. Importing one of these modules loads its model.

weights  arrays in memory, which any number of forked processes can share
device   on a GPU, or behind a thread: no fork of the process that loaded it can use it
"""
